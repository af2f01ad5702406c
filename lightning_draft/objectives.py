"""Objectives of policy gradients: losses of the log-probabilities that a model gives the steps of a rollout.

Shapes: `S` stochastic steps, `B` samples, of which every `group` in a row were drawn for one prompt.

References:
    Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301 (DDPO).
    Gupta et al., "A Simple and Effective Reinforcement Learning Method for Text-to-Image Diffusion Fine-tuning",
        arXiv:2503.00897 (LOOP).
    Deng et al., "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        arXiv:2402.08714.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError

Reduction = Literal["mean", "sum"]
ClipForm = Literal["min", "clip_only"]


@dataclass(frozen=True)
class PolicyBatch:
    """What an objective sees of a rollout.

    Args:
        log_probs: Of the steps that were taken, under the model as it is, `(S, B)`, float32.
        old_log_probs: The same under the model that took them.
        advantages: Of the samples, `(B,)`.
        group: How many samples in a row share a prompt.
        ref_log_probs: The same as `log_probs` under the base model, where the objective `needs_reference`.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    group: int = 1
    ref_log_probs: Tensor | None = None


class Objective(ABC):
    """A loss of log-probabilities.

    Args:
        reduction: Whether a step's log-probability is the `mean` or the `sum` over the latent's dimensions. They differ
            by a factor of 16384 for a latent of 4x64x64, and with them what `clip`, `beta` and a KL weight mean.

    Attributes:
        on_policy: The gradient holds for the parameters that drew the rollout alone.
        separable: The loss is a mean over steps and samples, so that any part of a rollout gives a part of it.
            Otherwise it is evaluated on whole rollouts, in two passes.
        needs_reference: It compares with the base model.
        min_group: The least number of samples a prompt.
    """

    on_policy: bool = False
    separable: bool = True
    needs_reference: bool = False
    min_group: int = 1

    def __init__(self, reduction: Reduction = "mean") -> None:
        if reduction not in get_args(Reduction):
            raise ConfigurationError(f"reduction={reduction!r} is not known; write mean or sum")
        self.reduction = reduction

    @abstractmethod
    def __call__(self, batch: PolicyBatch) -> Tensor:
        """The loss, a scalar."""

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Which steps have left the region that the objective trusts, bool `(S, B)`."""
        return torch.zeros_like(batch.log_probs, dtype=torch.bool)

    def reduce(self, total: Tensor, elements: int) -> Tensor:
        """Turn a sum over `elements` latent dimensions into what `reduction` says."""
        return total / elements if self.reduction == "mean" else total


class Reinforce(Objective):
    """`-A log p`, averaged over steps and samples: the score-function gradient, divided by the number of steps.

    It is on-policy: a rollout serves one optimiser step.

    Args:
        reduction: Whether a step's log-probability is the `mean` or the `sum` over the latent's dimensions.

    References:
        Williams, "Simple Statistical Gradient-Following Algorithms", 1992; Black et al., arXiv:2305.13301, eq. (5)
        (DDPO-SF).
    """

    on_policy = True

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Weigh each step's log-probability by its sample's advantage."""
        return -(batch.advantages * batch.log_probs).mean()


class PPO(Objective):
    """`max(-A rho, -A clip(rho, 1 - clip, 1 + clip))` averaged, with `rho = p / p_old` step by step.

    With `LeaveOneOut` it is LOOP, with `GroupRelative(divide_by_std=True)` GRPO.

    Args:
        clip: How far the ratio may leave 1 before a step teaches nothing more; DDPO's 1e-4 belongs to `mean`.
        reduction: Whether a step's log-probability is the `mean` or the `sum` over the latent's dimensions.
        advantage_clip: Advantages are clipped to this size; `null` leaves them alone.
        form: `min` is the pessimistic form above; `clip_only` is `-A clip(rho, ...)`, which also ignores steps that
            moved the wrong way.

    References:
        Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. (7); Black et al.,
        arXiv:2305.13301, eq. (6) and the authors' code (DDPO-IS).
    """

    def __init__(
        self,
        clip: float = 1e-4,
        reduction: Reduction = "mean",
        advantage_clip: float | None = 5.0,
        form: ClipForm = "min",
    ) -> None:
        super().__init__(reduction)
        self.clip = _positive("clip", clip)
        self.advantage_clip = None if advantage_clip is None else _positive("advantage_clip", advantage_clip)
        if form not in get_args(ClipForm):
            raise ConfigurationError(f"form={form!r} is not known; write min or clip_only")
        self.form = form

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Compare with the model that drew the rollout."""
        advantages, limit = batch.advantages, self.advantage_clip
        if limit is not None:
            advantages = advantages.clamp(-limit, limit)
        ratio = (batch.log_probs - batch.old_log_probs).exp()
        clipped = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        if self.form == "clip_only":
            return clipped.mean()
        return torch.maximum(-advantages * ratio, clipped).mean()

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Ratios further than `clip` from 1."""
        return ((batch.log_probs - batch.old_log_probs).expm1().abs() > self.clip).detach()


class PRDP(Objective):
    """Regress differences of implicit rewards on differences of rewards, for all pairs of samples of a prompt.

    With `rhat = sum_t log p / p_ref` the loss of a pair is `(rhat_a - rhat_b - (A_a - A_b) / beta)^2`; the larger of it
    and of the same with every step's log-ratio kept within `clip` of its old value counts. With
    `GroupRelative` advantages the differences of advantages are those of rewards, as in the paper. The loss couples all
    steps, so it takes two passes: one without a graph for its derivatives, and one that back-propagates them minibatch
    by minibatch, in memory that does not grow with the number of steps.

    Args:
        beta: Strength of the pull to the base model, in units of the reward per unit of log-ratio; the best model is
            `p_ref exp(r / beta)`. Its scale depends on `reduction`.
        clip: How far a step's log-ratio may move in the updates from one rollout.
        reduction: Whether a step's log-probability is the `mean` or the `sum` over the latent's dimensions.

    References:
        Deng et al., arXiv:2402.08714, eqs. (10) to (13); the paper's units of `beta` and `clip` are not known.
    """

    separable = False
    needs_reference = True
    min_group = 2

    def __init__(self, beta: float = 1.0, clip: float = 1e-4, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.beta = _positive("beta", beta)
        self.clip = _positive("clip", clip)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """The mean over pairs; `log_probs` must hold every step of whole groups."""
        assert batch.ref_log_probs is not None
        ratio, old = batch.log_probs - batch.ref_log_probs, batch.old_log_probs - batch.ref_log_probs
        proximal = torch.minimum(torch.maximum(ratio, old - self.clip), old + self.clip)
        plain, clipped = (self._pairs(each.sum(0), batch) for each in (ratio, proximal))
        return torch.maximum(plain, clipped).mean()

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Steps whose log-ratio moved further than `clip`."""
        return ((batch.log_probs - batch.old_log_probs).abs() > self.clip).detach()

    def _pairs(self, implicit: Tensor, batch: PolicyBatch) -> Tensor:
        """Squared errors of all pairs, `(prompts, pairs)`."""
        error = (implicit - batch.advantages / self.beta).view(-1, batch.group)
        first, second = zip(*combinations(range(batch.group), 2), strict=True)
        return (error[:, list(first)] - error[:, list(second)]).square()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigurationError(f"{name}={value} must be positive")
    return value
