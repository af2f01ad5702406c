"""Samplers: one sampling step, as a Gaussian `Transition`, and the time grid.

A sampler has hyper-parameters only. It receives `x_t` and the network's estimate of `x_0`, and never calls the network:
the loop over steps is in `lightning_draft.chain`.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, get_args

from torch import Tensor

from lightning_draft.arguments import at_least, in_range, integer_at_least, one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.schedules import Grid, RectifiedFlow, Schedule, Spacing, VariancePreserving
from lightning_draft.timesteps import ddim_timesteps, dpm_timesteps
from lightning_draft.transition import Transition


class Sampler(ABC):
    """The time grid, and one sampling step on it.

    Args:
        num_steps: Number of network calls in a chain.
        spacing: Timestep grid: `leading`, `trailing` or `linspace`; by default that of the model's scheduler.

    Raises:
        ConfigurationError: `num_steps` is less than 1, or `spacing` is not a timestep grid.
    """

    def __init__(self, num_steps: int = 50, spacing: Spacing | None = None) -> None:
        self.num_steps = integer_at_least("num_steps", num_steps, 1)
        if spacing is not None:
            one_of("spacing", spacing, get_args(Spacing))
        self.spacing = spacing

    @property
    def is_memoryless(self) -> bool:
        """Whether, as the number of steps grows, samples become independent of the starting noise."""
        return False

    def deterministic(self) -> "Sampler":
        """Return the same sampler without noise; `self` if it adds none.

        Raises:
            ConfigurationError: The sampler does not say what it is without noise.
        """
        name = type(self).__name__
        raise ConfigurationError(
            f"sampler={name} has no method `deterministic`, which gives the steps outside a window; write "
            f"sampler=DDIM(eta=1), or FlowSDE for a rectified flow, or add the method to {name}"
        )

    @abstractmethod
    def grid(self, schedule: Schedule) -> Grid:
        """Return `num_steps` pairs `(t, s)`, from the most to the least noise.

        Raises:
            ConfigurationError: The schedule is of another kind, or has no grid with this number of steps.
        """

    @abstractmethod
    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the distribution of the latent at `s`, and the solver state for the next step.

        Args:
            schedule: The model's noise schedule.
            x: The latent at `t`, `(B, ...)`.
            x0: The network's estimate of the clean latent, `(B, ...)`.
            t: Time of `x`.
            s: Time after the step; negative for the end of the chain.
            solver_state: Solver state returned by the previous step; `None` at the start and for single-step samplers.
        """


class DDIM(Sampler):
    """Denoising diffusion implicit models; `eta` = 0 is deterministic, 1 is DDPM's ancestral sampling.

        x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z,  eps = (x_t - alpha_t x_0) / sigma_t
        std = eta (sigma_s / sigma_t) sqrt(1 - (alpha_t / alpha_s)^2),  z ~ N(0, I)

    Args:
        num_steps: Number of network calls.
        eta: Factor on the standard deviation of DDPM's (fixed-small) noise, in [0, 1].
        spacing: Timestep grid; by default that of the model's scheduler.

    Raises:
        ConfigurationError: `eta` is out of range.

    References:
        Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, eqs. (12) and (16).
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)
        self.eta = in_range("eta", eta, 0, 1, "write 0 for DDIM or 1 for DDPM")

    @property
    def is_memoryless(self) -> bool:
        """Whether `eta` is 1, that is, the sampler is DDPM's."""
        return self.eta == 1

    def deterministic(self) -> "DDIM":
        """Return `DDIM` with `eta` = 0."""
        return DDIM(self.num_steps, 0.0, self.spacing)

    def grid(self, schedule: Schedule) -> Grid:
        """Return the grid of diffusers' `DDIMScheduler`, whose step is always `num_train_timesteps // num_steps`."""
        table = _variance_preserving(schedule, self)
        stride = table.num_train_timesteps // self.num_steps
        times = ddim_timesteps(table, self.num_steps, self.spacing)
        return tuple((t, t - stride) for t in times)

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return `N(alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps, std^2)`, eq. (12)."""
        alpha_t, sigma_t = schedule.coefficients(t)
        alpha_s, sigma_s = schedule.coefficients(s)
        eps = (x - alpha_t * x0) / sigma_t
        std = self.eta * (sigma_s / sigma_t) * math.sqrt(max(0.0, 1 - (alpha_t / alpha_s) ** 2))  # eq. (16)
        mean = alpha_s * x0 + math.sqrt(max(0.0, sigma_s**2 - std**2)) * eps
        return Transition(mean, std), None


class DPMSolverPlusPlus(Sampler):
    """DPM-Solver++(2M): second-order multistep in `x_0`, first order at both ends; deterministic.

        x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D,  h = lambda_s - lambda_t
        D = x_0 + (x_0 - x_0') h / (2 (lambda_t - lambda_t'))

    with `lambda = log(alpha / sigma)` and `x_0'` the estimate of the previous step, at `t'`; `D = x_0` in the first
    step, and the last step returns `x_0`.

    Args:
        num_steps: Number of network calls.
        spacing: Timestep grid; by default that of the model's scheduler.

    References:
        Lu et al., "DPM-Solver++", arXiv:2211.01095, algorithm 2.
    """

    def deterministic(self) -> "DPMSolverPlusPlus":
        """Return `self`."""
        return self

    def grid(self, schedule: Schedule) -> Grid:
        """Return the grid of diffusers' `DPMSolverMultistepScheduler` with `final_sigmas_type="zero"`."""
        table = _variance_preserving(schedule, self)
        times = dpm_timesteps(table, self.num_steps, self.spacing)
        return tuple(zip(times, (*times[1:], _END), strict=True))

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the point `x_s`, and `(x0, t)` as the solver state."""
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
    """Euler's method on the rectified flow's ODE; deterministic.

        x_s = x_t + (s - t) v,  v = (x_t - x_0) / t

    Args:
        num_steps: Number of network calls.

    References:
        Liu et al., "Flow Straight and Fast", arXiv:2209.03003.
    """

    def __init__(self, num_steps: int = 28) -> None:
        super().__init__(num_steps)

    def deterministic(self) -> "FlowEuler":
        """Return `FlowEuler`."""
        return FlowEuler(self.num_steps)

    def grid(self, schedule: Schedule) -> Grid:
        """Return the grid of diffusers' `FlowMatchEulerDiscreteScheduler` on this schedule; it ends at 0."""
        if not isinstance(schedule, RectifiedFlow):
            raise ConfigurationError(
                f"{type(self).__name__} needs a rectified-flow model; use DDIM or DPMSolverPlusPlus"
            )
        times = schedule.times(self.num_steps)
        return tuple(zip(times, (*times[1:], 0.0), strict=True))

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the point `x + (s - t) v`."""
        return Transition(x + (s - t) / t * (x - x0), 0.0), None


class FlowSDE(FlowEuler):
    """The Euler-Maruyama method on the stochastic differential equation with the rectified flow's marginals.

        x_s = x_t + (v + sigma_t^2 / (2 t) (x_t + (1 - t) v)) (s - t) + sigma_t sqrt(t - s) z
        sigma_t = noise_level sqrt(t / (1 - t)),  z ~ N(0, I)

    The last step, to 0, is an Euler step. At `t` = 1, `sigma_t` is infinite; `1 - t` in `sigma_t` is then replaced by
    `1 - s`, as in the authors' code.

    Args:
        num_steps: Number of network calls.
        noise_level: Factor on the noise, at least 0; 0 is `FlowEuler`.

    Raises:
        ConfigurationError: `noise_level` is negative.

    References:
        Liu et al., "Flow-GRPO", arXiv:2505.05470, eq. (9) and the authors' code.
    """

    def __init__(self, num_steps: int = 10, noise_level: float = 0.7) -> None:
        super().__init__(num_steps)
        self.noise_level = at_least("noise_level", noise_level, 0)

    @property
    def is_memoryless(self) -> bool:
        """Whether `noise_level` is sqrt(2), to three digits."""
        return abs(self.noise_level - math.sqrt(2)) < 1e-3

    def diffusion(self, t: float, s: float) -> float:
        """Return `sigma_t` of the step from `t` to `s`."""
        return self.noise_level * math.sqrt(t / (1 - (s if t >= 1 else t)))

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the Gaussian of one Euler-Maruyama step."""
        if s <= 0:
            return super().step(schedule, x, x0, t, s)
        sigma = self.diffusion(t, s)
        velocity, dt = (x - x0) / t, s - t
        half = sigma**2 / (2 * t)
        mean = x * (1 + half * dt) + velocity * (1 + half * (1 - t)) * dt
        return Transition(mean, sigma * math.sqrt(-dt)), None


_END = -1.0


def _variance_preserving(schedule: Schedule, sampler: Sampler) -> VariancePreserving:
    if not isinstance(schedule, VariancePreserving):
        raise ConfigurationError(
            f"{type(sampler).__name__} needs a variance-preserving model; use FlowEuler or FlowSDE"
        )
    if sampler.num_steps > schedule.num_train_timesteps:
        raise ConfigurationError(
            f"num_steps={sampler.num_steps} exceeds the model's {schedule.num_train_timesteps} training timesteps; "
            "lower num_steps"
        )
    return schedule
