"""Objectives of policy gradients: losses of the log-probabilities of the sampling steps of a rollout.

Shapes: `S` stochastic steps, `B` samples; each `group` consecutive samples have the same prompt.

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

from lightning_draft.arguments import one_of, positive

Reduction = Literal["mean", "sum"]
ClipForm = Literal["min", "clip_only"]


@dataclass(frozen=True)
class MeanChange:
    """How far the means of the steps have moved since the rollout.

    Args:
        kl: `KL(p_old || p) = |mu - mu_old|^2 / (2 std^2)`, `(S, B)`, with the reduction of the log-probabilities.
        stds: Standard deviations of the steps, `(S, 1)`.
        lengths: Lengths of the steps in time, as fractions of the schedule, `(S, 1)`.
    """

    kl: Tensor
    stds: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class PolicyBatch:
    """Inputs of an objective: a minibatch of a rollout, or the whole rollout.

    Args:
        log_probs: Log-probabilities of the steps under the current model, `(S, B)`, float32.
        old_log_probs: The same under the model that sampled them.
        advantages: Advantages of the samples, `(B,)`.
        group: Number of consecutive samples with the same prompt.
        ref_log_probs: The same as `log_probs` under the base model, if the objective `needs_reference`.
        change: The change of the steps' means, if the objective `needs_old_means`.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    group: int = 1
    ref_log_probs: Tensor | None = None
    change: MeanChange | None = None


class RolloutObjective(ABC):
    """A loss of a minibatch of a rollout.

    Attributes:
        on_policy: Whether the gradient is correct only for the parameters that sampled the rollout.
        separable: Whether the loss is a mean over minibatches, so that their losses add up to it. Otherwise it is
            computed on whole rollouts, in two passes.
        min_group: Smallest valid number of samples per prompt.
    """

    on_policy: bool = False
    separable: bool = True
    min_group: int = 1


class Objective(RolloutObjective):
    """A loss of log-probabilities.

    Args:
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions. They
            differ by a factor of 16384 for a latent of 4x64x64, and so do the meanings of `clip`, `beta` and a KL
            weight.

    Attributes:
        needs_reference: Whether the loss needs log-probabilities under the base model.
        needs_old_means: Whether the loss needs the means of the rollout's steps, which it then stores.

    Raises:
        ConfigurationError: The reduction is unknown.
    """

    needs_reference: bool = False
    needs_old_means: bool = False

    def __init__(self, reduction: Reduction = "mean") -> None:
        self.reduction = one_of("reduction", reduction, get_args(Reduction))

    @abstractmethod
    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the loss, a scalar."""

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Return which steps have left the trust region, bool `(S, B)`."""
        return torch.zeros_like(batch.log_probs, dtype=torch.bool)

    def reduce(self, total: Tensor, elements: int) -> Tensor:
        """Return a sum over `elements` latent dimensions, divided by `elements` if `reduction` is `mean`."""
        return total / elements if self.reduction == "mean" else total


class Reinforce(Objective):
    """The score-function gradient: `L = -1 / (S B) sum_{t,i} A_i log p(x_{t-1,i} | x_{t,i})`.

    It is on-policy: there is one optimizer step per rollout.

    Args:
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.

    References:
        Williams, "Simple Statistical Gradient-Following Algorithms", 1992; Black et al., arXiv:2305.13301, eq. (5)
        (DDPO-SF), here divided by the number of steps.
    """

    on_policy = True

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Weight the log-probability of each step by the advantage of its sample."""
        return -(batch.advantages * batch.log_probs).mean()


class PPO(Objective):
    """Clipped policy gradient with one ratio per step, `rho = p(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)`.

    `L = mean_{t,i} max(-A_i rho_{t,i}, -A_i clip(rho_{t,i}, 1 - clip, 1 + clip))`

    With `LeaveOneOut` it is LOOP, with `GroupRelative(divide_by_std=True)` GRPO.

    Args:
        clip: Largest distance of the ratio from 1 at which a step has a gradient; DDPO's 1e-4 is for `mean`.
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.
        advantage_clip: Advantages are clipped to `-advantage_clip..advantage_clip`; `null` does not clip them.
        form: `min` is the pessimistic form above; `clip_only` is `-A clip(rho, ...)`, which also has no gradient for
            steps that moved in the wrong direction.

    Raises:
        ConfigurationError: An option is out of range.

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
        self.clip = positive("clip", clip)
        self.advantage_clip = None if advantage_clip is None else positive("advantage_clip", advantage_clip)
        self.form = one_of("form", form, get_args(ClipForm))

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Compute the loss from the ratios to the model that sampled the rollout."""
        return self.losses(batch).mean()

    def log_ratio(self, batch: PolicyBatch) -> Tensor:
        """Return `log rho`, `(S, B)`."""
        return batch.log_probs - batch.old_log_probs

    def losses(self, batch: PolicyBatch) -> Tensor:
        """Return the losses of the steps, `(S, B)`."""
        advantages, limit = batch.advantages, self.advantage_clip
        if limit is not None:
            advantages = advantages.clamp(-limit, limit)
        ratio = self.log_ratio(batch).exp()
        clipped = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        if self.form == "clip_only":
            return clipped
        return torch.maximum(-advantages * ratio, clipped)

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Return for which samples `|rho - 1| > clip`, bool `(S, B)`."""
        return (self.log_ratio(batch).expm1().abs() > self.clip).detach()


class APA(Objective):
    """Advantage-induced policy alignment: regress the log-ratio of a step on the advantage.

    `L = mean_{t,i} (log p(x_{t-1,i} | x_{t,i}) - log p_old(x_{t-1,i} | x_{t,i}) - A_i / strength)^2`

    Its gradient at the model that sampled the rollout is that of `Reinforce` times `2 / strength`.

    Args:
        strength: Strength of the regularization towards the old model, in units of the advantage per unit of
            log-ratio, positive.
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Zhu et al., "Fine-Tuning Language Models with Advantage-Induced Policy Alignment", arXiv:2306.02231.
    """

    def __init__(self, strength: float = 1000.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.strength = positive("strength", strength)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the mean squared error."""
        return (batch.log_probs - batch.old_log_probs - batch.advantages / self.strength).square().mean()


class PRDP(Objective):
    """Regress differences of implicit rewards on differences of rewards, for all pairs of samples of a prompt.

    With the implicit reward `rhat_i = sum_t log p(x_{t-1,i} | x_{t,i}) / p_ref(x_{t-1,i} | x_{t,i})`,

    `L = mean_{(i,j)} max((rhat_i - rhat_j - (A_i - A_j) / beta)^2, (rclip_i - rclip_j - (A_i - A_j) / beta)^2)`,

    with `rclip` equal to `rhat` with the log-ratio of every step clipped to `clip` around its old value. With
    `GroupRelative` advantages `A_i - A_j = r_i - r_j`, as in the paper. The loss couples all steps, so it is computed
    in two passes. The first computes its gradient with respect to the log-probabilities, without a network graph; the
    second back-propagates this gradient minibatch by minibatch, so that memory does not grow with the number of steps.

    Args:
        beta: Strength of the regularization towards the base model, in units of the reward per unit of log-ratio; the
            optimum is `p = p_ref exp(r / beta) / Z`. Its scale depends on `reduction`.
        clip: Largest change of the log-ratio of a step in the updates from one rollout.
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Deng et al., arXiv:2402.08714, eqs. (10) to (13); the paper's units of `beta` and `clip` are not known.
    """

    separable = False
    needs_reference = True
    min_group = 2

    def __init__(self, beta: float = 1.0, clip: float = 1e-4, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.beta = positive("beta", beta)
        self.clip = positive("clip", clip)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the mean over pairs; `log_probs` must contain all steps of complete groups."""
        assert batch.ref_log_probs is not None
        ratio, old = batch.log_probs - batch.ref_log_probs, batch.old_log_probs - batch.ref_log_probs
        proximal = torch.minimum(torch.maximum(ratio, old - self.clip), old + self.clip)
        plain, clipped = (self._pair_losses(each.sum(0), batch) for each in (ratio, proximal))
        return torch.maximum(plain, clipped).mean()

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Return for which samples the log-ratio of a step changed by more than `clip`."""
        return ((batch.log_probs - batch.old_log_probs).abs() > self.clip).detach()

    def _pair_losses(self, implicit: Tensor, batch: PolicyBatch) -> Tensor:
        """Return the squared errors of all pairs, `(prompts, pairs)`."""
        error = (implicit - batch.advantages / self.beta).view(-1, batch.group)
        first, second = zip(*combinations(range(batch.group), 2), strict=True)
        return (error[:, list(first)] - error[:, list(second)]).square()
