"""Objectives that limit each step's change by other means than the ratio's clip.

Shapes: `S` stochastic steps, `B` samples.
"""

from torch import Tensor

from lightning_draft.arguments import positive
from lightning_draft.objectives import PPO, MeanChange, Objective, PolicyBatch, Reduction


class GRPOGuard(PPO):
    """PPO with a log-ratio whose mean is 0 at every step, and whose spread does not depend on `std`.

        log rho' = std (log rho + |mu - mu_old|^2 / (2 std^2)) = z . (mu - mu_old),  x = mu_old + std z
        L = mean_{t,i} max(-A_i rho', -A_i clip(rho', 1 - clip, 1 + clip)) / (t - s)

    with the ratio `rho` of `PPO`, `|.|^2` and the product averaged over the latent's dimensions if `reduction` is
    `mean`, and a step from time `t` to `s`, in units of the whole schedule. The expectation of `log rho'` is 0 for any
    `mu`, whereas that of `log rho` is negative.

    Args:
        clip: Largest distance of `rho'` from 1 at which a step has a gradient.
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.
        advantage_clip: Advantages are clipped to `-advantage_clip..advantage_clip`; `null` does not clip them.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Wang et al., "GRPO-Guard", arXiv:2510.22319, and the code of Flow-GRPO.
    """

    needs_old_means = True

    def __init__(self, clip: float = 2e-6, reduction: Reduction = "mean", advantage_clip: float | None = 5.0) -> None:
        super().__init__(clip, reduction, advantage_clip)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the losses of the steps over their lengths, averaged."""
        return (self.losses(batch) / _change(batch).lengths).mean()

    def log_ratio(self, batch: PolicyBatch) -> Tensor:
        """Return `log rho'`, `(S, B)`."""
        change = _change(batch)
        return change.stds * (super().log_ratio(batch) + change.kl)


class FlowDPPO(Objective):
    """Policy gradient without a clip, whose steps stop where the divergence from the old policy is large.

        L = -mean_{t,i} m A_i rho_{t,i},  m = 0 if KL(p_old || p) > max_kl and A_i (rho_{t,i} - 1) > 0, else 1

    with `KL = |mu - mu_old|^2 / (2 std^2)`. Unlike the ratio, the divergence does not depend on the sampled noise.

    Args:
        max_kl: Divergence above which a step that moves further in the advantage's direction has no gradient.
        reduction: Whether log-probabilities and `KL` are the `mean` or the `sum` over the latent's dimensions.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        "Flow-DPPO", arXiv:2606.11025, and the authors' code.
    """

    needs_old_means = True

    def __init__(self, max_kl: float = 1e-5, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.max_kl = positive("max_kl", max_kl)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the mean over the steps that are not masked, and 0 for the others."""
        return _masked_loss(batch, self.clipped(batch))

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Return which steps are masked, bool `(S, B)`."""
        moved = (batch.log_probs - batch.old_log_probs).detach()
        return (_change(batch).kl.detach() > self.max_kl) & (batch.advantages * moved > 0)


class SampleDropout(Objective):
    """Policy gradient that drops steps whose ratio is far from 1, whatever the sign of their advantages.

        L = -mean_{t,i} [|rho_{t,i} - 1| <= max_change] A_i rho_{t,i}

    The remaining ratios are at most `1 + max_change`, which bounds the variance of the gradient.

    Args:
        max_change: Largest distance of the ratio from 1, positive.
        reduction: Whether the log-probability of a step is the `mean` or the `sum` over the latent's dimensions.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Lin et al., "Sample Dropout: A Simple yet Effective Variance Reduction Technique in Deep Policy Optimization",
        arXiv:2302.02299.
    """

    def __init__(self, max_change: float = 1e-4, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.max_change = positive("max_change", max_change)

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Return the mean over all steps; dropped steps count as 0."""
        return _masked_loss(batch, self.clipped(batch))

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """Return which steps are dropped, bool `(S, B)`."""
        return ((batch.log_probs - batch.old_log_probs).expm1().abs() > self.max_change).detach()


def _change(batch: PolicyBatch) -> MeanChange:
    assert batch.change is not None
    return batch.change


def _masked_loss(batch: PolicyBatch, masked: Tensor) -> Tensor:
    """Return `-mean_{t,i} A_i rho_{t,i}`, to which masked steps `(S, B)` contribute 0."""
    ratio = (batch.log_probs - batch.old_log_probs).exp()
    return -(batch.advantages * ratio).masked_fill(masked, 0).mean()
