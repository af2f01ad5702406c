"""Objectives of the forward process: denoising losses on noised samples, weighted by their advantages.

Notation: `x_0` is a sample of a rollout, `x_t = alpha_t x_0 + sigma_t eps` with new noise `eps`, and `x0(x_t)` the
    model's estimate of `x_0`. `e = mean |u_theta(x_t) - u|^2` is the denoising error of a sample, averaged over its
    dimensions, with `u` the quantity that the network predicts (noise, velocity or flow). `e_old` and `e_ref` are the
    errors of the old policy and of the base model. `A` is the advantage; each `G` consecutive samples have the same
    prompt.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_draft.arguments import at_least, positive
from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import PPO, Objective, PolicyBatch, RolloutObjective

Reference = Literal["old", "base"]


@dataclass(frozen=True)
class ForwardBatch:
    """Samples, and estimates of the samples at one time.

    Args:
        samples: `x_0`, `(B, ...)`.
        estimate: The current model's estimate of `x_0`, with a graph.
        advantages: `(B,)`.
        group: Number of consecutive samples with the same prompt.
        sigma: Noise level of the time.
        slope: Derivative of the estimate of `x_0` with respect to the network's output, not 0.
        old: The old policy's estimate, if the objective `needs_old`.
        ref: The base model's estimate, if the objective `needs_reference`.
    """

    samples: Tensor
    estimate: Tensor
    advantages: Tensor
    group: int
    sigma: float
    slope: float
    old: Tensor | None = None
    ref: Tensor | None = None

    def error(self, estimate: Tensor) -> Tensor:
        """Return the denoising error of an estimate, `(B,)`."""
        return self.distance(estimate, self.samples)

    def distance(self, estimate: Tensor, other: Tensor) -> Tensor:
        """Return the mean squared difference of the network outputs of two estimates, `(B,)`."""
        wide = torch.promote_types(estimate.dtype, torch.float32)
        return ((estimate.to(wide) - other.to(wide)) / self.slope).square().flatten(1).mean(1)

    def reference(self, name: Reference) -> Tensor:
        """Return the estimate of the old policy or of the base model."""
        estimate = self.old if name == "old" else self.ref
        assert estimate is not None
        return estimate

    def groups(self, values: Tensor) -> Tensor:
        """Return `(B,)` values by prompt, `(prompts, group)`."""
        return values.view(-1, self.group)


class ForwardObjective(RolloutObjective):
    """A denoising loss of noised samples.

    Attributes:
        needs_old: Whether the loss needs estimates of the old policy.
        needs_reference: Whether the loss needs estimates of the base model.
        couples_group: Whether the loss couples the samples of a prompt, so that a minibatch must contain complete
            groups.
        shares_noise: Whether the same noise is added to all samples of a prompt.
    """

    needs_old: bool = False
    needs_reference: bool = False
    couples_group: bool = False
    shares_noise: bool = False

    @abstractmethod
    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Return the loss, a scalar."""

    def select(self, advantages: Tensor) -> Tensor:
        """Return which samples of each prompt are trained on, `(prompts, g)`, from advantages `(prompts, group)`."""
        return torch.arange(advantages.shape[1], device=advantages.device).expand_as(advantages)

    def rows(self, advantages: Tensor, samples: slice, group: int) -> tuple[list[int], int]:
        """Return the trained samples of a minibatch, and the number of consecutive ones with the same prompt.

        Args:
            advantages: Those of the whole rollout, `(N,)`.
            samples: The minibatch.
            group: Number of consecutive samples of the rollout with the same prompt.
        """
        rows = range(*samples.indices(len(advantages)))
        if not self.couples_group:
            return list(rows), group
        chosen = self.select(advantages[samples].view(-1, group))
        first = torch.arange(len(chosen), device=chosen.device)[:, None] * group
        return [rows[index] for index in (first + chosen).flatten().tolist()], chosen.shape[1]

    def clipped(self, batch: ForwardBatch) -> Tensor | None:
        """Return which samples have left the trust region, bool `(B,)`; `None` without a trust region."""
        return None


class DiffusionNFT(ForwardObjective):
    """Negative-aware fine-tuning: the loss moves estimates towards good samples and away from bad ones.

        x0+ = (1 - beta) x0_old + beta x0_theta,  x0- = (1 + beta) x0_old - beta x0_theta
        q = clip(A, -c, c) / (2 c) + 1/2,  w+- = sg(mean |x0+- - x_0|)
        L = c / beta mean_i [q |x0+ - x_0|^2 / w+ + (1 - q) |x0- - x_0|^2 / w-]

    If the model is the old policy, the gradient is that of `A |x0_theta - x_0|^2 / w` for any `beta` and `c`.

    Args:
        beta: Strength of the implicit guidance, positive; the authors use 1 and 0.1.
        advantage_clip: `c`, positive.

    Raises:
        ConfigurationError: An option is not positive.

    References:
        Zheng et al., "DiffusionNFT", arXiv:2509.16117, and the authors' code, which has the factor `c / beta`.
    """

    needs_old = True

    def __init__(self, beta: float = 1.0, advantage_clip: float = 5.0) -> None:
        self.beta = positive("beta", beta)
        self.advantage_clip = positive("advantage_clip", advantage_clip)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Weight the losses of the positive and the negative estimate."""
        old, limit = batch.reference("old"), self.advantage_clip
        change = self.beta * (batch.estimate - old)
        good = batch.advantages.clamp(-limit, limit) / (2 * limit) + 0.5
        losses = good * self._loss(old + change, batch) + (1 - good) * self._loss(old - change, batch)
        return limit / self.beta * losses.mean()

    def _loss(self, estimate: Tensor, batch: ForwardBatch) -> Tensor:
        difference = (estimate - batch.samples).flatten(1)
        weight = difference.detach().abs().mean(1).clamp(min=1e-5)
        return difference.square().mean(1) / weight


class AWM(ForwardObjective):
    """Advantage weighted matching: a policy gradient whose log-probability is the negative denoising error.

        log p(x_0) := -sigma_t^power e,  L = objective(log p, log p_old, A)

    With `Reinforce` the gradient is that of `A sigma_t^power e`.

    Args:
        policy: The objective of log-probabilities, `PPO` or `Reinforce`; with its `reduction`, `e` is a mean or a sum
            over the latent's dimensions.
        power: Exponent of the weight of a time, at least 0; the authors' weights are `uniform` (0), `t` (1) and `t**2`
            (2).

    Raises:
        ConfigurationError: `policy` couples steps or needs the base model.

    References:
        Xue et al., "Advantage Weighted Matching", arXiv:2509.25050, and the authors' code.
    """

    def __init__(self, policy: Objective | None = None, power: float = 0.0) -> None:
        self.policy = PPO(clip=0.1) if policy is None else policy
        self.power = at_least("power", power, 0)
        if not self.policy.separable or self.policy.needs_reference or self.policy.needs_old_means:
            raise ConfigurationError(
                f"policy={type(self.policy).__name__} must be an objective of single steps; use PPO or Reinforce, or "
                "the objective CRD to compare samples"
            )
        self.needs_old, self.on_policy = not self.policy.on_policy, self.policy.on_policy
        self.min_group = self.policy.min_group

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Return the policy objective of the denoising errors."""
        return self.policy(self._policy_batch(batch))

    def clipped(self, batch: ForwardBatch) -> Tensor | None:
        """Return which samples the policy objective clips."""
        return self.policy.clipped(self._policy_batch(batch))[0]

    def _policy_batch(self, batch: ForwardBatch) -> PolicyBatch:
        log_probs = self._log_prob(batch.estimate, batch)
        old = log_probs.detach() if batch.old is None else self._log_prob(batch.old, batch)
        return PolicyBatch(log_probs, old, batch.advantages, batch.group)

    def _log_prob(self, estimate: Tensor, batch: ForwardBatch) -> Tensor:
        elements = estimate[0].numel()
        total = batch.sigma**self.power * batch.error(estimate) * elements
        return -self.policy.reduce(total, elements)[None]


class RWR(ForwardObjective):
    """Reward-weighted regression: `L = mean_i min(exp(A_i / temperature), max_weight) e_i`.

    With the module's `kl_weight` it is ORW-CFM, whose regularization is `kl_weight |u_theta - u_ref|^2`.

    Args:
        temperature: Temperature of the weights, in units of the advantage, positive.
        max_weight: Upper bound of a weight, positive.

    Raises:
        ConfigurationError: An option is not positive.

    References:
        Lee et al., arXiv:2302.12192; Fan et al., "Online Reward-Weighted Fine-Tuning of Flow Matching with Wasserstein
        Regularization", arXiv:2502.06061. The bound is that of Peng et al., arXiv:1910.00177.
    """

    def __init__(self, temperature: float = 1.0, max_weight: float = 20.0) -> None:
        self.temperature = positive("temperature", temperature)
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Weight the denoising error of each sample."""
        weights = (batch.advantages / self.temperature).exp().clamp(max=self.max_weight)
        return (weights * batch.error(batch.estimate)).mean()
