"""Noise schedules: what fraction of a latent is signal and what is noise at each time.

Every schedule writes the forward process as `x_t = alpha_t x_0 + sigma_t eps`.

References:
    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    Liu et al., "Flow Straight and Fast", arXiv:2209.03003 (rectified flow).
    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891 (trailing grids).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]


class Schedule(ABC):
    """The forward process of a model family."""

    num_train_timesteps: int

    @abstractmethod
    def coefficients(self, t: float) -> tuple[float, float]:
        """Return `(alpha_t, sigma_t)`; a negative `t` stands for the end of the chain."""

    @abstractmethod
    def network_time(self, t: float) -> float:
        """Return the number that the network is given for time `t`."""

    def log_snr(self, t: float) -> float:
        """Return `lambda_t = log(alpha_t / sigma_t)`, infinite where there is no noise or no signal."""
        alpha, sigma = self.coefficients(t)
        if alpha == 0 or sigma == 0:
            return math.inf if sigma == 0 else -math.inf
        return math.log(alpha) - math.log(sigma)


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """A discrete schedule with `alpha_t^2 + sigma_t^2 = 1`, as DDPM and Stable Diffusion 1 and 2 use.

    Args:
        alphas_cumprod: The table of `alpha_t^2`, one entry a training timestep.
        final_alpha_cumprod: `alpha^2` after the last step: 1, or the table's first entry
            (diffusers' `set_alpha_to_one=False`).
        spacing: The grid that samplers use unless they are given one.
        steps_offset: What diffusers adds to every timestep of a leading grid.
    """

    alphas_cumprod: tuple[float, ...]
    final_alpha_cumprod: float = 1.0
    spacing: Spacing = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        check_spacing(self.spacing)

    @classmethod
    def from_table(
        cls, table: Tensor, *, set_alpha_to_one: bool = True, spacing: Spacing = "leading", steps_offset: int = 0
    ) -> "VariancePreserving":
        """Build from a 1-D tensor of cumulative products, as diffusers' schedulers hold it."""
        values = tuple(table.double().tolist())
        return cls(values, 1.0 if set_alpha_to_one else values[0], spacing, steps_offset)

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        """Length of the table."""
        return len(self.alphas_cumprod)

    def coefficients(self, t: float) -> tuple[float, float]:
        """Look the time up in the table; a negative time is the end of the chain."""
        abar = self.final_alpha_cumprod if t < 0 else self.alphas_cumprod[int(t)]
        return math.sqrt(abar), math.sqrt(1 - abar)

    def network_time(self, t: float) -> float:
        """Discrete networks are given the timestep itself."""
        return t


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """`alpha_t = 1 - t`, `sigma_t = t` for `t` in [0, 1], as Stable Diffusion 3 and FLUX use.

    Args:
        shift: Moves the grid towards high noise: `t -> shift t / (1 + (shift - 1) t)` (SD3, eq. 23).
        num_train_timesteps: The network is given `t` times this.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def coefficients(self, t: float) -> tuple[float, float]:
        """`(1 - t, t)`; a negative time is the end of the chain."""
        return (1.0, 0.0) if t < 0 else (1.0 - t, t)

    def network_time(self, t: float) -> float:
        """`t` in units of training timesteps."""
        return t * self.num_train_timesteps

    def shifted(self, t: float) -> float:
        """Apply the shift to an evenly spaced time."""
        return self.shift * t / (1 + (self.shift - 1) * t)


def check_spacing(spacing: str) -> None:
    """Raise `ValueError` unless `spacing` names a grid."""
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing={spacing!r} is not a timestep grid; write one of {', '.join(get_args(Spacing))}")
