"""Baselines: from the rewards of a rollout to advantages, so that a gradient learns from what is better than usual.

Rewards are `(N,)` with every `group` in a row drawn for one prompt. In a distributed run a baseline is given the
rewards of all processes, in the same order on each, so that its state is the same on each.

References:
    Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301 (per-prompt statistics).
    Gupta et al., arXiv:2503.00897 (leave-one-out); Liu et al., "Flow-GRPO", arXiv:2505.05470 (division by the spread).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError


class AdvantageEstimator(ABC):
    """Turns rewards into advantages.

    Attributes:
        min_group: The least number of samples a prompt.
    """

    min_group: int = 1

    @abstractmethod
    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Advantages `(N,)`.

        Args:
            rewards: `(N,)`.
            prompts: `N` prompts, one a sample.
            group: How many samples in a row share a prompt.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, in plain types; a copy, which later rewards do not change."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most have none)
        """Continue from a saved state."""


class GroupRelative(AdvantageEstimator):
    """`r - mean` over the samples of the prompt, optionally divided by their standard deviation (GRPO).

    Args:
        divide_by_std: Divide by `std + epsilon`, the standard deviation of the population.
        epsilon: Keeps groups of equal rewards at 0.
    """

    min_group = 2

    def __init__(self, divide_by_std: bool = False, epsilon: float = 1e-4) -> None:
        if not epsilon > 0:
            raise ConfigurationError(f"epsilon={epsilon} must be positive")
        self.divide_by_std = divide_by_std
        self.epsilon = epsilon

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Centre each group."""
        centred = _centred(rewards, group)
        if self.divide_by_std:
            centred = centred / (centred.square().mean(1, keepdim=True).sqrt() + self.epsilon)
        return centred.flatten()


class LeaveOneOut(AdvantageEstimator):
    """`r_i - mean_{j != i} r_j` over the samples of the prompt: unbiased, and not divided by anything (RLOO, LOOP)."""

    min_group = 2

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """`K / (K - 1) (r - mean)`, which is the same."""
        return (group / (group - 1) * _centred(rewards, group)).flatten()


class PerPromptStatistics(AdvantageEstimator):
    """`(r - mean) / std` by the prompt's last rewards, or by the rollout's where the prompt has been seen too rarely.

    Args:
        buffer_size: How many rewards of a prompt are remembered.
        min_count: From how many on they are used.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if not 2 <= min_count <= buffer_size:
            raise ConfigurationError(f"min_count={min_count} must lie in 2..buffer_size={buffer_size}")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._seen: dict[str, list[float]] = {}

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Remember the rewards, then standardise them."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._seen[str(prompt)] = [*self._seen.get(str(prompt), []), reward][-self.buffer_size :]
        known = {prompt: torch.tensor(self._seen[prompt]) for prompt in {str(prompt) for prompt in prompts}}
        everything = rewards.float().cpu()
        chosen = [known[str(p)] if len(known[str(p)]) >= self.min_count else everything for p in prompts]
        mean = torch.stack([values.mean() for values in chosen]).to(rewards)
        std = torch.stack([values.std(correction=0) for values in chosen]).to(rewards)
        return (rewards - mean) / (std + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """The rewards that are remembered, by prompt."""
        return {"seen": {prompt: list(values) for prompt, values in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember them again; the state of another baseline has none, and what is remembered is gathered anew."""
        self._seen = {prompt: list(values) for prompt, values in state.get("seen", {}).items()}


def _centred(rewards: Tensor, group: int) -> Tensor:
    """`(prompts, group)`; exactly 0 where all rewards of a group are equal."""
    groups = rewards.view(-1, group)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(1, keepdim=True)
