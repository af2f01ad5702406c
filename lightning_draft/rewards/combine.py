"""Sums of rewards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward, check_scores


@dataclass(frozen=True)
class WeightedReward:
    """A part of a `WeightedSum`.

    Args:
        reward: The part.
        weight: Its factor, of either sign; a part of weight 0 is only logged.
    """

    reward: Reward
    weight: float = 1.0


class WeightedSum(Reward):
    """`sum_i weight_i reward_i`; the breakdown holds every part by name, without its weight.

    Differentiable where every part is whose weight is not 0.

    Args:
        rewards: Parts by name; names are letters, digits, `_` and `-`, and are what the parts are logged as.

    Raises:
        ConfigurationError: There are no parts, or a name cannot be used.
    """

    def __init__(self, rewards: dict[str, WeightedReward]) -> None:
        super().__init__()
        if not rewards:
            raise ConfigurationError("WeightedSum has no rewards; name at least one under `rewards`")
        self.parts = nn.ModuleDict({_checked(name): part.reward for name, part in rewards.items()})
        self.weights = {name: part.weight for name, part in rewards.items()}
        self.differentiable = all(part.reward.differentiable for part in rewards.values() if part.weight != 0)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`; parts of weight 0 are not evaluated."""
        total = torch.zeros(len(images), device=images.device)
        for name, weight in self.weights.items():
            if weight != 0:
                total = total + weight * self._score(name, images, prompts)[0]
        return total

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum `(B,)` and every part `(B,)` by name; the parts of a part are named `part/name`."""
        total = torch.zeros(len(images), device=images.device)
        scores: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                scores[name], inner = self._score(name, images, prompts)
            scores.update({f"{name}/{key}": value for key, value in inner.items()})
            if weight != 0:
                total = total + weight * scores[name]
        return total, scores

    def _score(self, name: str, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        reward = self.parts[name]
        assert isinstance(reward, Reward)
        score, inner = reward.breakdown(images, prompts)
        try:
            return check_scores(score, len(images), reward), inner
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigurationError(
            f"{name!r} cannot name a reward; use letters, digits, _ and -, and none of keys, values, items, pop, train"
        )
    return name
