"""Objectives of the forward process that compare the samples of a prompt with each other.

The notation is that of `lightning_draft.forward_objectives`.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import one_of, positive
from lightning_draft.forward_objectives import ForwardBatch, ForwardObjective, Reference


class OnlineDPO(ForwardObjective):
    """Direct preference optimization on the best and the worst sample of each prompt, noised with the same noise.

    `L = mean_prompts -log sigmoid(-beta / 2 [(e^best - e_ref^best) - (e^worst - e_ref^worst)])`

    Prompts whose samples have equal advantages have no loss. The network is called for these two samples only.

    Args:
        beta: Strength of the regularization towards the base model, positive.

    Raises:
        ConfigurationError: `beta` is not positive.

    References:
        Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv:2311.12908, eq. (14);
        with pairs of samples of the current model as in Flow-GRPO's code, arXiv:2505.05470.
    """

    needs_reference = True
    couples_group = True
    shares_noise = True
    min_group = 2

    def __init__(self, beta: float = 100.0) -> None:
        self.beta = positive("beta", beta)

    def select(self, advantages: Tensor) -> Tensor:
        """Return the best and the worst sample of each prompt."""
        return torch.stack([advantages.argmax(1), advantages.argmin(1)], 1)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Return the mean over prompts of the loss of a pair."""
        gain = batch.error(batch.estimate) - batch.error(batch.reference("base"))
        best, worst = batch.groups(gain).T
        better, worse = batch.groups(batch.advantages).T
        losses = F.softplus(self.beta / 2 * (best - worst))
        return torch.where(better > worse, losses, 0.0).mean()


class DGPO(ForwardObjective):
    """Direct group preference optimization: the samples of a prompt as one preference, weighted by their advantages.

    `L = mean_prompts 1 / beta softplus(beta / G sum_i A_i (e_i - e_ref,i))`

    The gradient of a prompt is that of `w / G sum_i A_i e_i` with `w = sigmoid(beta / G sum_i A_i (e_i - e_ref,i))`. A
    sample has no gradient if `exp(e_old - e)` has changed by more than `clip` in the direction of its advantage.

    Args:
        beta: Strength of the preference, positive.
        clip: Width of the trust region, positive; `null` for no trust region, which saves the network call of the old
            policy.
        advantage_clip: Advantages are clipped to `-advantage_clip..advantage_clip`.
        reference: Reference of `e_ref`: the `base` model, or the `old` policy, as in the authors' code after some
            steps.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Luo et al., "Reinforcing Diffusion Models by Direct Group Preference Optimization", arXiv:2510.08425, and the
        authors' code.
    """

    couples_group = True
    shares_noise = True
    min_group = 2

    def __init__(
        self,
        beta: float = 100.0,
        clip: float | None = 0.01,
        advantage_clip: float = 5.0,
        reference: Reference = "base",
    ) -> None:
        self.beta = positive("beta", beta)
        self.clip = None if clip is None else positive("clip", clip)
        self.advantage_clip = positive("advantage_clip", advantage_clip)
        one_of("reference", reference, get_args(Reference))
        self.reference = reference
        self.needs_reference = reference == "base"
        self.needs_old = reference == "old" or clip is not None

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Return the loss, averaged over prompts."""
        error, clipped = batch.error(batch.estimate), self.clipped(batch)
        if clipped is not None:
            error = torch.where(clipped, error.detach(), error)
        gain = error - batch.error(batch.reference(self.reference))
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return (F.softplus(self.beta * batch.groups(advantages * gain).mean(1)) / self.beta).mean()

    def clipped(self, batch: ForwardBatch) -> Tensor | None:
        """Return which samples have left the trust region."""
        if self.clip is None:
            return None
        ratio = (batch.error(batch.reference("old")) - batch.error(batch.estimate)).exp().detach()
        return torch.where(batch.advantages > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)


class CRD(ForwardObjective):
    """Centered reward distillation: regress centered implicit rewards on centered advantages.

        rhat_i = e_old,i - e_i,  L = mean_i (beta (rhat_i - mean_G rhat) - (A_i - mean_G A))^2

    The means are over the samples of a prompt, so that the normalizing constant of the optimal policy cancels. It is
    PRDP with the negative denoising error as the log-probability.

    Args:
        beta: Factor from denoising errors to units of the advantage, positive.
        reference: Reference of the implicit reward: the `old` policy or the `base` model.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Zhu et al., "Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv:2603.14128.
    """

    couples_group = True
    min_group = 2

    def __init__(self, beta: float = 1.0, reference: Reference = "old") -> None:
        self.beta = positive("beta", beta)
        one_of("reference", reference, get_args(Reference))
        self.reference = reference
        self.needs_old, self.needs_reference = reference == "old", reference == "base"

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Return the variance within prompts of the difference, averaged over prompts."""
        implicit = batch.error(batch.reference(self.reference)) - batch.error(batch.estimate)
        difference = batch.groups(self.beta * implicit - batch.advantages)
        return (difference - difference.mean(1, keepdim=True)).square().mean()
