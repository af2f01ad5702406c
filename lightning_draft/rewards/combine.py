"""Sums of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward, check_name, check_scores


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
        ConfigurationError: There are no parts, all weights are 0, or a name cannot be used.
    """

    def __init__(self, rewards: dict[str, WeightedReward]) -> None:
        super().__init__()
        if not any(part.weight for part in rewards.values()):
            raise ConfigurationError(
                "WeightedSum has no reward whose weight is not 0, so its score would be constant; name at least one "
                "under `rewards`"
            )
        self.weights = {check_name(name): part.weight for name, part in rewards.items()}
        self.parts = nn.ModuleList(part.reward for part in rewards.values())
        self.differentiable = all(part.reward.differentiable for part in rewards.values() if part.weight != 0)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`; parts of weight 0 are not evaluated."""
        total = torch.zeros(len(images), device=images.device)
        for (name, weight), reward in zip(self.weights.items(), self.parts, strict=True):
            if weight != 0:
                total = total + weight * _checked_scores(name, reward(images, prompts), len(images), reward)
        return total

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum `(B,)` and every part `(B,)` by name; the parts of a part are named `part/name`."""
        total = torch.zeros(len(images), device=images.device)
        scores: dict[str, Tensor] = {}
        for (name, weight), reward in zip(self.weights.items(), self.parts, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                score, inner = cast(Reward, reward).breakdown(images, prompts)
            scores[name] = _checked_scores(name, score, len(images), reward)
            scores.update({f"{name}/{key}": value for key, value in inner.items()})
            if weight != 0:
                total = total + weight * score
        return total, scores


def _checked_scores(name: str, scores: Tensor, batch_size: int, reward: nn.Module) -> Tensor:
    try:
        return check_scores(scores, batch_size, reward)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error
