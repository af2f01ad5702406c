"""Noise schedules: how much of a latent is signal and how much is noise at each time.

Every schedule writes the forward process as `x_t = alpha_t x_0 + sigma_t eps`.

References:
    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    Liu et al., "Flow Straight and Fast", arXiv:2209.03003 (rectified flow).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_draft.arguments import one_of

Spacing = Literal["leading", "trailing", "linspace"]
GridEnd = Literal["shifted", "even"]

Grid = tuple[tuple[float, float], ...]
"""One `(t, s)` pair per step: the network is called at `t`, and the step ends at `s`; a negative `s` is the end."""


def step_at(grid: Grid, t: float) -> int:
    """Return the number of the step of a grid during which the time is `t`; 0 for times before the first step."""
    return max(0, sum(start >= t for start, _ in grid) - 1)


class Schedule(ABC):
    """The forward process of a model family."""

    num_train_timesteps: int

    @abstractmethod
    def coefficients(self, t: float) -> tuple[float, float]:
        """Return `(alpha_t, sigma_t)`; a negative `t` is the end of the chain."""

    @abstractmethod
    def network_time(self, t: float) -> float:
        """Return the time `t` in the units of the network's input."""

    @abstractmethod
    def time_at(self, fraction: float) -> float:
        """Return the time at a fraction in [0, 1) of the way from sample to noise."""

    def log_snr(self, t: float) -> float:
        """Return `lambda_t = log(alpha_t / sigma_t)`; infinity without noise, minus infinity without signal."""
        alpha, sigma = self.coefficients(t)
        if alpha == 0 or sigma == 0:
            return math.inf if sigma == 0 else -math.inf
        return math.log(alpha) - math.log(sigma)


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """A discrete schedule, as used by DDPM and Stable Diffusion 1 and 2.

        alpha_t = sqrt(alphas_cumprod[t]),  sigma_t = sqrt(1 - alphas_cumprod[t])

    Args:
        alphas_cumprod: The table of `alpha_t^2`, one entry per training timestep.
        final_alpha_cumprod: `alpha^2` after the last step: 1, or the table's first entry
            (diffusers' `set_alpha_to_one=False`).
        spacing: The timestep grid that samplers use by default: `leading`, `trailing` or `linspace`.
        steps_offset: Offset that diffusers adds to every timestep of a leading grid.

    Raises:
        ConfigurationError: `spacing` is not a timestep grid.
    """

    alphas_cumprod: tuple[float, ...]
    final_alpha_cumprod: float = 1.0
    spacing: Spacing = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        one_of("spacing", self.spacing, get_args(Spacing))

    @classmethod
    def from_table(
        cls, table: Tensor, *, set_alpha_to_one: bool = True, spacing: Spacing = "leading", steps_offset: int = 0
    ) -> "VariancePreserving":
        """Build from a 1-D tensor of cumulative products, the `alphas_cumprod` of a diffusers scheduler."""
        values = tuple(table.double().tolist())
        return cls(values, 1.0 if set_alpha_to_one else values[0], spacing, steps_offset)

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        """Length of the table."""
        return len(self.alphas_cumprod)

    def coefficients(self, t: float) -> tuple[float, float]:
        """Return `(sqrt(abar_t), sqrt(1 - abar_t))` from the table; a negative `t` is the end of the chain."""
        abar = self.final_alpha_cumprod if t < 0 else self.alphas_cumprod[int(t)]
        return math.sqrt(abar), math.sqrt(1 - abar)

    def network_time(self, t: float) -> float:
        """Return `t`, because the input of discrete networks is the timestep itself."""
        return t

    def time_at(self, fraction: float) -> float:
        """Return the timestep `floor(fraction num_train_timesteps)`."""
        return int(fraction * self.num_train_timesteps)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """The linear path from sample to noise, as used by Stable Diffusion 3 and FLUX.

        alpha_t = 1 - t,  sigma_t = t,  t in [0, 1]

    Args:
        shift: Moves the time grid towards high noise: `t -> shift t / (1 + (shift - 1) t)` (SD3, eq. 23).
        num_train_timesteps: Factor of `t` in the network's input.
        last: Smallest of the evenly spaced times, before they are shifted: `shifted` is the smallest shifted training
            time, the default of diffusers' scheduler; `even` is `1 / num_steps`, as in the pipelines of FLUX.
        terminal: If given, times are stretched so that the last one equals this value.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    last: GridEnd = "shifted"
    terminal: float | None = None

    def coefficients(self, t: float) -> tuple[float, float]:
        """Return `(1 - t, t)`; a negative `t` is the end of the chain."""
        return (1.0, 0.0) if t < 0 else (1.0 - t, t)

    def network_time(self, t: float) -> float:
        """Return `t * num_train_timesteps`."""
        return t * self.num_train_timesteps

    def time_at(self, fraction: float) -> float:
        """Return the shifted time, at least `1 / num_train_timesteps`: at `t` = 0 there is nothing to denoise."""
        return self.shifted(max(fraction, 1 / self.num_train_timesteps))

    def shifted(self, t: float, num_steps: int = 1) -> float:
        """Return `shift t / (1 + (shift - 1) t)`."""
        shift = self.shift_for(num_steps)
        return shift * t / (1 + (shift - 1) * t)

    def shift_for(self, num_steps: int) -> float:
        """Return the shift of a grid of this many steps."""
        return self.shift

    def times(self, num_steps: int) -> list[float]:
        """Return the times at which a sampler of this many steps calls the network."""
        low = {"shifted": self.shifted(1 / self.num_train_timesteps), "even": 1 / num_steps}[self.last]
        even = [1 + (low - 1) * i / max(1, num_steps - 1) for i in range(num_steps)]
        times = [self.shifted(t, num_steps) for t in even]
        if self.terminal is None or times[-1] == 1:
            return times
        stretch = (1 - self.terminal) / (1 - times[-1])
        return [1 - (1 - t) * stretch for t in times]


@dataclass(frozen=True)
class EmpiricalFlow(RectifiedFlow):
    """The rectified flow of FLUX.2, whose shift depends on the number of steps.

        shift = exp(mu),  mu = mu_10 + (mu_200 - mu_10) (num_steps - 10) / 190
        mu_10 = 8.73809524e-5 tokens + 1.89833333,  mu_200 = 1.6927e-4 tokens + 0.45666666

    and `mu = mu_200` for more than 4300 tokens. Times outside a grid, `time_at`, have the shift of one step.

    Args:
        tokens: Number of the image's tokens.

    References:
        Black Forest Labs, https://github.com/black-forest-labs/flux2, `compute_empirical_mu`.
    """

    tokens: int = 4096

    def shift_for(self, num_steps: int) -> float:
        """Return `exp(mu)` for this many steps."""
        few, many = 8.73809524e-5 * self.tokens + 1.89833333, 1.6927e-4 * self.tokens + 0.45666666
        return math.exp(many if self.tokens > 4300 else few + (many - few) * (num_steps - 10) / 190)


@dataclass(frozen=True)
class TrigonometricFlow(RectifiedFlow):
    """The trigonometric flow of continuous-time consistency models, rescaled to a rectified flow.

    The trigonometric flow `y_a = cos(a) x_0 + sin(a) eps`, with the angle `a` from 0 to pi/2, is at each time a
    multiple of a rectified flow:

        x_t = y_a / (cos(a) + sin(a)) = (1 - t) x_0 + t eps,  t = sin(a) / (cos(a) + sin(a))

    The angles of a grid are evenly spaced, and those of two steps are pi/2 and 1.3, as in diffusers' `SCMScheduler`.
    `shift` has no effect.

    References:
        Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", arXiv:2410.11081.
        Chen et al., "SANA-Sprint", arXiv:2503.09641, which derives the change of time and scale.
    """

    last: GridEnd = "even"

    def shifted(self, t: float, num_steps: int = 1) -> float:
        """Return the time at the angle `t pi / 2`."""
        return _time_of(t * math.pi / 2)

    def times(self, num_steps: int) -> list[float]:
        """Return the times at which a sampler of this many steps calls the network."""
        return [1.0, _time_of(1.3)] if num_steps == 2 else super().times(num_steps)


def _time_of(angle: float) -> float:
    return math.sin(angle) / (math.cos(angle) + math.sin(angle))
