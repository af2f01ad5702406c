"""Samplers: the arithmetic of one denoising step, as a Gaussian `Transition`, and the grid of times it walks.

A sampler holds hyper-parameters only. It is given `x_t` and the network's estimate of `x_0`, and never calls the
network: the loop over steps lives in `lightning_draft.chain`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_draft.schedules import RectifiedFlow, Schedule, Spacing, VariancePreserving, check_spacing

Grid = tuple[tuple[float, float], ...]
"""One `(t, s)` pair a step: the network is called at `t`, the step ends at `s`; a negative `s` is the end."""


@dataclass(frozen=True)
class Transition:
    """The distribution of the next latent: an isotropic Gaussian, or a point where `std` is 0.

    Args:
        mean: `(B, ...)`.
        std: Standard deviation, the same for every element.
    """

    mean: Tensor
    std: float

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """Draw by reparametrisation, `mean + std * noise`; `noise` is drawn here unless it is given."""
        if self.std == 0:
            return self.mean
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `x` summed over the latent's dimensions, float32 or wider, `(B,)`.

        Raises:
            ValueError: The step is deterministic and has no density.
        """
        self._check_stochastic("log_prob")
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        z = (x.to(wide) - self.mean.to(wide)) / self.std
        elements = z[0].numel()
        return -0.5 * z.square().flatten(1).sum(1) - elements * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

    def kl(self, other: "Transition") -> Tensor:
        """`KL(self || other)` summed over the latent's dimensions, float32 or wider, `(B,)`.

        Raises:
            ValueError: Either step is deterministic.
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
            raise ValueError(
                f"{what} of a deterministic step is not defined; use a stochastic sampler: DDIM(eta=1) or FlowSDE"
            )


class Sampler(ABC):
    """One denoising step and the grid it walks.

    Args:
        num_steps: Number of network evaluations in a chain.
        spacing: `leading`, `trailing` or `linspace`; by default what the model's own scheduler says.
    """

    def __init__(self, num_steps: int = 50, spacing: Spacing | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        if spacing is not None:
            check_spacing(spacing)
        self.num_steps = num_steps
        self.spacing = spacing

    @abstractmethod
    def grid(self, schedule: Schedule) -> Grid:
        """Return `num_steps` pairs `(t, s)`, from the most to the least noise."""

    @abstractmethod
    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the distribution of the latent at `s`, and what the next step needs to remember.

        Args:
            schedule: The model's noise schedule.
            x: The latent at `t`, `(B, ...)`.
            x0: The network's estimate of the clean latent, `(B, ...)`.
            t: Time of `x`.
            s: Time to go to; negative for the end of the chain.
            solver_state: What the previous step returned; `None` at the start.
        """

    def final_coefficient(self, schedule: Schedule) -> float:
        """`d x_final / d eps` of the last step: where it is 0, DRaFT-1 and DRaFT-LV learn nothing.

        Infinite for a step that starts from pure noise (`alpha_t` = 0) and uses the network.
        """
        t, s = self.grid(schedule)[-1]
        alpha, sigma = schedule.coefficients(t)
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        slope = self.step(schedule, zero, one, t, s)[0].mean - self.step(schedule, zero, zero, t, s)[0].mean
        if slope.item() == 0:
            return 0.0
        return -slope.item() * (sigma / alpha if alpha > 0 else math.inf)


class DDIM(Sampler):
    """Denoising diffusion implicit models; `eta` = 0 is deterministic, 1 is DDPM's ancestral sampling.

    Args:
        num_steps: Number of network evaluations.
        eta: Share of DDPM's (fixed-small) variance that is injected at each step.
        spacing: Timestep grid; by default what the model's own scheduler says.

    References:
        Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, eqs. (12) and (16).
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is DDIM, 1 is DDPM")
        self.eta = eta

    def grid(self, schedule: Schedule) -> Grid:
        """The grid of diffusers' `DDIMScheduler`, which always steps back by `num_train_timesteps // num_steps`."""
        table = _variance_preserving(schedule, self)
        stride = table.num_train_timesteps // self.num_steps
        times = _checked(_ddim_times(table, self.num_steps, self.spacing or table.spacing), table)
        return tuple((t, t - stride) for t in times)

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Equation (12), with `eps` recovered from `x0`."""
        alpha_t, sigma_t = schedule.coefficients(t)
        alpha_s, sigma_s = schedule.coefficients(s)
        eps = (x - alpha_t * x0) / sigma_t
        std = self.eta * (sigma_s / sigma_t) * math.sqrt(max(0.0, 1 - (alpha_t / alpha_s) ** 2))  # eq. (16)
        mean = alpha_s * x0 + math.sqrt(max(0.0, sigma_s**2 - std**2)) * eps
        return Transition(mean, std), None


class DPMSolverPlusPlus(Sampler):
    """DPM-Solver++(2M): second-order multistep in `x_0`, first order at both ends; deterministic.

    Args:
        num_steps: Number of network evaluations.
        spacing: Timestep grid; by default what the model's own scheduler says.

    References:
        Lu et al., "DPM-Solver++", arXiv:2211.01095, algorithm 2.
    """

    def grid(self, schedule: Schedule) -> Grid:
        """The grid of diffusers' `DPMSolverMultistepScheduler` with `final_sigmas_type="zero"`."""
        table = _variance_preserving(schedule, self)
        times = _checked(_dpm_times(table, self.num_steps, self.spacing or table.spacing), table)
        return tuple(zip(times, (*times[1:], _END), strict=True))

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Extrapolate `x_0` from this estimate and the previous one, `solver_state = (x0, t)` of the step before."""
        alpha_s, sigma_s = (1.0, 0.0) if s < 0 else schedule.coefficients(s)
        if sigma_s == 0:
            return Transition(alpha_s * x0, 0.0), None
        lambda_t, lambda_s = schedule.log_snr(t), schedule.log_snr(s)
        h = lambda_s - lambda_t
        target = x0
        if solver_state is not None:
            previous, previous_t = solver_state
            ratio = (lambda_t - schedule.log_snr(previous_t)) / h
            target = x0 + (x0 - previous) / (2 * ratio)
        _, sigma_t = schedule.coefficients(t)
        return Transition((sigma_s / sigma_t) * x - alpha_s * math.expm1(-h) * target, 0.0), (x0, t)


class FlowEuler(Sampler):
    """Euler's method on the rectified flow's ODE; deterministic. The grid is set by the schedule's shift.

    Args:
        num_steps: Number of network evaluations.

    References:
        Liu et al., "Flow Straight and Fast", arXiv:2209.03003.
    """

    def __init__(self, num_steps: int = 28) -> None:
        super().__init__(num_steps)

    def grid(self, schedule: Schedule) -> Grid:
        """The grid of diffusers' `FlowMatchEulerDiscreteScheduler`: from 1 to `1 / num_train_timesteps`, then 0."""
        if not isinstance(schedule, RectifiedFlow):
            raise ValueError(f"{type(self).__name__} needs a rectified-flow model; use DDIM or DPMSolverPlusPlus")
        low = schedule.shifted(1 / schedule.num_train_timesteps)
        even = [1 + (low - 1) * i / max(1, self.num_steps - 1) for i in range(self.num_steps)]
        times = [schedule.shifted(t) for t in even]
        return tuple(zip(times, (*times[1:], 0.0), strict=True))

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """`x + (s - t) v` with `v = (x - x_0) / t`."""
        return Transition(x + (s - t) / t * (x - x0), 0.0), None


class FlowSDE(FlowEuler):
    """The stochastic differential equation with the rectified flow's marginals, by Euler and Maruyama.

    Args:
        num_steps: Number of network evaluations.
        noise_level: `c` in `sigma_t = c sqrt(t / (1 - t))`; 0 is `FlowEuler`.

    References:
        Liu et al., "Flow-GRPO", arXiv:2505.05470, eq. (9) and the authors' code.
    """

    def __init__(self, num_steps: int = 10, noise_level: float = 0.7) -> None:
        super().__init__(num_steps)
        if noise_level < 0:
            raise ValueError(f"noise_level={noise_level} must not be negative")
        self.noise_level = noise_level

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Drift corrected so that marginals are kept. The last step, to 0, adds no noise.

        At `t` = 1, where `sigma_t` is infinite, `1 - t` is replaced by `1 - s` as in the authors' code.
        """
        if s <= 0:
            return super().step(schedule, x, x0, t, s)
        sigma = self.noise_level * math.sqrt(t / (1 - (s if t >= 1 else t)))
        velocity, dt = (x - x0) / t, s - t
        half = sigma**2 / (2 * t)
        mean = x * (1 + half * dt) + velocity * (1 + half * (1 - t)) * dt
        return Transition(mean, sigma * math.sqrt(-dt)), None


_END = -1.0


def _variance_preserving(schedule: Schedule, sampler: Sampler) -> VariancePreserving:
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(f"{type(sampler).__name__} needs a variance-preserving model; use FlowEuler or FlowSDE")
    if sampler.num_steps > schedule.num_train_timesteps:
        raise ValueError(f"num_steps={sampler.num_steps} exceeds the {schedule.num_train_timesteps} training timesteps")
    return schedule


def _ddim_times(table: VariancePreserving, steps: int, spacing: Spacing) -> list[int]:
    total = table.num_train_timesteps
    if spacing == "leading":
        return [i * (total // steps) + table.steps_offset for i in reversed(range(steps))]
    if spacing == "trailing":
        # numpy's rounding of ties is diffusers' grid; its arange may also yield one element too many.
        return _whole(np.arange(total, 0, -total / steps)[:steps].round() - 1)
    return _whole(np.linspace(0, total - 1, steps).round()[::-1])


def _dpm_times(table: VariancePreserving, steps: int, spacing: Spacing) -> list[int]:
    total = table.num_train_timesteps
    if spacing == "leading":
        return [i * (total // (steps + 1)) + table.steps_offset for i in range(steps, 0, -1)]
    if spacing == "trailing":
        return _ddim_times(table, steps, spacing)
    return _whole(np.linspace(0, total - 1, steps + 1).round()[:0:-1])


def _whole(times: Any) -> list[int]:
    return [int(t) for t in times]


def _checked(times: list[int], table: VariancePreserving) -> list[int]:
    last = table.num_train_timesteps - 1
    if times[0] > last or any(s >= t for t, s in zip(times, times[1:], strict=False)):
        raise ValueError(
            f"num_steps={len(times)} does not fit the schedule's timesteps 0..{last} on this grid; lower num_steps or "
            'write spacing="trailing"'
        )
    return times
