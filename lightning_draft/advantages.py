"""Advantages: how much better than expected the rewards of a rollout are.

Rewards are `(N,)`; each `group` consecutive rewards belong to samples of the same prompt. In a distributed run an
estimator receives the rewards of all processes, in the same order on each, so that its state is the same on each.

References:
    Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301 (per-prompt statistics).
    Gupta et al., arXiv:2503.00897 (leave-one-out); Liu et al., "Flow-GRPO", arXiv:2505.05470 (division by the standard
    deviation).
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_draft.arguments import boolean, in_range, integer, integer_at_least, positive
from lightning_draft.errors import ConfigurationError

Rewards = Sequence[float]


class AdvantageEstimator(ABC):
    """Compute advantages from rewards.

    Attributes:
        min_group: Smallest valid number of samples per prompt.
    """

    min_group: int = 1
    _marked: Mapping[str, Any] = {}

    @abstractmethod
    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Return advantages `(N,)`.

        Args:
            rewards: `(N,)`.
            prompts: `N` prompts, one per sample.
            group: Number of consecutive samples with the same prompt.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Restore a saved state."""

    def mark(self) -> None:
        """Mark the state before an optimizer step; a checkpoint of an interrupted step saves this state."""
        self._marked = self.state_dict()

    def marked_state(self) -> dict[str, Any]:
        """Return the state dict at the last call of `mark`."""
        return dict(self._marked)


class ImageAdvantages(AdvantageEstimator):
    """Compute advantages from rewards and features of the images."""

    min_group = 2

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Raise, because there are no images.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            f"{type(self).__name__} needs the images of the samples; use from_features, or GroupRelative"
        )

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return what is compared of images `(B, 3, H, W)` in [0, 1], `(B, ...)`."""

    @abstractmethod
    def from_features(self, rewards: Tensor, features: Tensor, group: int) -> Tensor:
        """Return advantages `(N,)` from rewards `(N,)` and features `(N, ...)`."""


class GroupRelative(AdvantageEstimator):
    """`A_i = r_i - mean(r)` over the samples of the prompt, or `A_i = (r_i - mean(r)) / (std(r) + epsilon)` (GRPO).

    Args:
        divide_by_std: Divide by the (population) standard deviation of the prompt's rewards.
        epsilon: Positive; avoids a division by 0 in groups of equal rewards.
    """

    min_group = 2

    def __init__(self, divide_by_std: bool = False, epsilon: float = 1e-4) -> None:
        self.divide_by_std = boolean("divide_by_std", divide_by_std)
        self.epsilon = positive("epsilon", epsilon)

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Subtract the mean of each group."""
        values = centered(rewards, group)
        if self.divide_by_std:
            values = values / (values.square().mean(1, keepdim=True).sqrt() + self.epsilon)
        return values.flatten()


class LeaveOneOut(AdvantageEstimator):
    """`A_i = r_i - 1 / (K - 1) sum_{j != i} r_j` over the `K` samples of the prompt: unbiased (RLOO, LOOP)."""

    min_group = 2

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Compute the equivalent expression `K / (K - 1) (r - mean)`."""
        return (group / (group - 1) * centered(rewards, group)).flatten()


class PerPromptStatistics(AdvantageEstimator):
    """`A_i = (r_i - mean) / (std + 1e-6)`, with mean and std of the last rewards of the prompt (DDPO).

    The statistics are those of the prompt's last `buffer_size` rewards, including the current ones. For a prompt with
    fewer than `min_count` rewards, the mean and standard deviation of the whole rollout are used instead.

    Args:
        buffer_size: Number of rewards that are stored for each prompt.
        min_count: Number of stored rewards that are needed to use them, in `2..buffer_size`.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.buffer_size = integer_at_least("buffer_size", buffer_size, 2)
        self.min_count = in_range("min_count", integer("min_count", min_count), 2, buffer_size)
        self._rewards: dict[str, Rewards] = {}
        self._before_mark: dict[str, Rewards] = {}  # arrays that have changed since the mark

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Store the rewards, then standardize them."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._append(str(prompt), reward)
        known = {prompt: torch.tensor(self._rewards[prompt]) for prompt in {str(prompt) for prompt in prompts}}
        rollout = rewards.float().cpu()
        chosen = [known[str(p)] if len(known[str(p)]) >= self.min_count else rollout for p in prompts]
        mean = torch.stack([values.mean() for values in chosen]).to(rewards)
        std = torch.stack([values.std(correction=0) for values in chosen]).to(rewards)
        return (rewards - mean) / (std + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Return `seen`: the stored rewards of each prompt."""
        return {"seen": {prompt: list(rewards) for prompt, rewards in self._rewards.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the stored rewards; the state of another estimator has none."""
        self._rewards = {prompt: array("f", rewards) for prompt, rewards in state.get("seen", {}).items()}
        self.mark()

    def mark(self) -> None:
        """Mark the state in constant time: old values are stored only when they change."""
        self._before_mark = {}

    def marked_state(self) -> dict[str, Any]:
        """Return the state at the mark."""
        then = {**self._rewards, **self._before_mark}
        return {"seen": {prompt: list(rewards) for prompt, rewards in then.items() if len(rewards)}}

    def _append(self, prompt: str, reward: float) -> None:
        """Add a reward in a new array, because the old array may be part of the state at the mark."""
        rewards = self._rewards.get(prompt, ())
        self._before_mark.setdefault(prompt, rewards)
        self._rewards[prompt] = array("f", [*rewards, reward][-self.buffer_size :])


def centered(rewards: Tensor, group: int) -> Tensor:
    """Return `r - mean` by group, `(prompts, group)`; exactly 0 if all rewards of a group are equal."""
    groups = rewards.view(-1, group)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(1, keepdim=True)
