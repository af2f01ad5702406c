"""Options of an adaptive KL term: for suspicious samples only, and towards a reference that follows the model.

References:
    He et al., "GARDO: Reinforcing Diffusion Models without Reward Hacking", arXiv:2512.24138, and the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_draft.arguments import in_range, integer_at_least, positive
from lightning_draft.errors import ConfigurationError


@dataclass(frozen=True)
class KLGate:
    """Regularize only the samples that the trained reward ranks higher than the evaluation rewards do.

        U_i = w_i(r) - mean_k w_i(r_k)
        sample i has a KL term if U_i > the quantile 1 - fraction of {U_j : U_j >= 0}

    with the trained reward `r`, evaluation rewards `r_k`, and the win rate `w_i(r)`: the fraction of the other samples
    of the rollout, of all processes, that have a smaller reward; equal rewards count half. After each rollout, with `m`
    the mean of `{U_j : U_j >= 0}`, the fraction is multiplied by `1 + growth` if `m` is larger than in all of the last
    `history` rollouts, and by `1 - growth` if it is smaller than in all of them.

    Args:
        rewards: Names of the module's `eval_rewards`; by default all. They are computed on every sample.
        fraction: Fraction of the samples with `U_i >= 0` that are regularized in the first rollout, in (0, 1].
        min_fraction: Smallest fraction, in [0, fraction].
        max_fraction: Largest fraction, in [fraction, 1].
        growth: Relative change of the fraction, in [0, 1).
        history: Number of rollouts that `m` is compared with, at least 1.

    Raises:
        ConfigurationError: An option is out of range.
    """

    rewards: list[str] | None = None
    fraction: float = 0.1
    min_fraction: float = 0.02
    max_fraction: float = 0.2
    growth: float = 0.1
    history: int = 20

    def __post_init__(self) -> None:
        in_range("kl_gate.fraction", positive("kl_gate.fraction", self.fraction), 0, 1, "write for example 0.1")
        in_range("kl_gate.min_fraction", self.min_fraction, 0, self.fraction)
        in_range("kl_gate.max_fraction", self.max_fraction, self.fraction, 1)
        in_range("kl_gate.growth", self.growth, 0, 1, "write for example 0.1", below_high=True)
        integer_at_least("kl_gate.history", self.history, 1)
        if self.rewards == []:
            raise ConfigurationError("kl_gate.rewards=[] is empty; leave it out to compare with all evaluation rewards")

    def adapt(self, fraction: float, mean: float, recent: Sequence[float]) -> float:
        """Return the fraction for a rollout with `m = mean`, after rollouts whose values were `recent`."""
        if recent and mean > max(recent):
            fraction *= 1 + self.growth
        elif recent and mean < min(recent):
            fraction *= 1 - self.growth
        return min(max(fraction, self.min_fraction), self.max_fraction)


@dataclass(frozen=True)
class MovingReference:
    """Replace the reference of the KL term by the current model from time to time; the first one is the base model.

    Before a rollout, the reference becomes the current model if the mean KL divergence of the last optimizer step
    exceeds `max_kl`, or if it is `max_rollouts` rollouts old.

    Args:
        max_kl: Largest divergence, as logged by `train/kl`, positive; `null` does not limit it.
        max_rollouts: Largest age, at least 1; `null` does not limit it.

    Raises:
        ConfigurationError: An option is out of range, or both are `null`.
    """

    max_kl: float | None = None
    max_rollouts: int | None = 15

    def __post_init__(self) -> None:
        if self.max_kl is not None:
            positive("kl_reference.max_kl", self.max_kl)
        if self.max_rollouts is not None:
            integer_at_least("kl_reference.max_rollouts", self.max_rollouts, 1)
        if self.max_kl is None and self.max_rollouts is None:
            raise ConfigurationError(
                "kl_reference: max_kl and max_rollouts are null, so that the reference never changes; give one of "
                "them a value, or set kl_reference to null"
            )

    def is_outdated(self, kl: float, rollouts: int) -> bool:
        """Return whether a reference is replaced, at a divergence and an age in rollouts."""
        too_far = self.max_kl is not None and kl > self.max_kl
        return too_far or (self.max_rollouts is not None and rollouts >= self.max_rollouts)


def disagreement(trained: Tensor, evaluated: Sequence[Tensor]) -> Tensor:
    """Return `U_i`, `(N,)`, float64: the win rate of each sample's trained reward minus its mean win rate otherwise.

    Args:
        trained: Trained rewards, `(N,)`.
        evaluated: Evaluation rewards, each `(N,)`.
    """
    # Twice the numbers of wins are integers, so that samples on which all rewards agree have exactly 0.
    others = torch.stack([_wins(rewards) for rewards in evaluated]).sum(0)
    difference = len(evaluated) * _wins(trained) - others
    return difference / (2 * len(evaluated) * max(len(trained) - 1, 1))


def suspicious(values: Tensor, fraction: float) -> Tensor:
    """Return which of the `U_i`, `(N,)`, exceed the quantile `1 - fraction` of those that are at least 0."""
    return values > torch.nanquantile(nonnegative(values), 1 - fraction)


def nonnegative(values: Tensor) -> Tensor:
    """Return the values, and NaN in the place of those below 0."""
    return values.masked_fill(values < 0, torch.nan)


def _wins(rewards: Tensor) -> Tensor:
    """Return twice the number of other samples with a smaller reward, ties counted half, float64."""
    mine, theirs = rewards.double()[:, None], rewards.double()[None, :]
    return (mine > theirs).double().sum(1) + (mine >= theirs).double().sum(1) - 1
