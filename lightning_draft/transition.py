"""The distribution of the next latent in a sampling chain."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError


@dataclass(frozen=True)
class Transition:
    """The distribution of the next latent, `N(mean, std^2 I)`; a single point if `std` is 0.

    Args:
        mean: `(B, ...)`.
        std: Standard deviation, the same for every element.
    """

    mean: Tensor
    std: float

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """Sample with the reparameterization trick, `mean + std * noise`; by default `noise` is sampled."""
        if self.std == 0:
            return self.mean
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of `x` summed over the latent's dimensions, float32 or wider, `(B,)`.

        Raises:
            ConfigurationError: The step is deterministic and has no density.
        """
        self._check_stochastic("log_prob")
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        z = (x.to(wide) - self.mean.to(wide)) / self.std
        elements = z[0].numel()
        return -0.5 * z.square().flatten(1).sum(1) - elements * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

    def kl(self, other: "Transition") -> Tensor:
        """Return `KL(self || other)` summed over the latent's dimensions, float32 or wider, `(B,)`.

        Raises:
            ConfigurationError: Either step is deterministic.
        """
        self._check_stochastic("kl")
        other._check_stochastic("kl")
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        elements = self.mean[0].numel()
        ratio = (self.std / other.std) ** 2
        distance = ((self.mean.to(wide) - other.mean.to(wide)) / other.std).square().flatten(1).sum(1)
        return 0.5 * (distance + elements * (ratio - 1 - math.log(ratio)))

    def _check_stochastic(self, what: str) -> None:
        if self.std == 0:
            raise ConfigurationError(
                f"{what} of a deterministic step is not defined; use a stochastic sampler: DDIM(eta=1) or FlowSDE"
            )
