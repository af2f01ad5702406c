"""Further stochastic samplers of rectified flows, for policy gradients."""

import math
from typing import Any

from torch import Tensor

from lightning_draft.arguments import in_range
from lightning_draft.samplers import FlowEuler, FlowSDE
from lightning_draft.schedules import Schedule
from lightning_draft.transition import Transition


class DanceSDE(FlowSDE):
    """The stochastic differential equation of `FlowSDE` with a constant diffusion, `sigma_t = noise_level`.

    The last step, to 0, is an Euler step; the authors' code adds noise there too.

    Args:
        num_steps: Number of network calls.
        noise_level: The diffusion, at least 0; 0 is `FlowEuler`.

    Raises:
        ConfigurationError: `noise_level` is negative.

    References:
        Xue et al., "DanceGRPO", arXiv:2505.07818, and the authors' code.
    """

    def __init__(self, num_steps: int = 10, noise_level: float = 0.3) -> None:
        super().__init__(num_steps, noise_level)

    @property
    def is_memoryless(self) -> bool:
        """False: a constant diffusion removes only a part of the starting noise."""
        return False

    def diffusion(self, t: float, s: float) -> float:
        """Return the noise level."""
        return self.noise_level


class FlowCPS(FlowEuler):
    """Coefficients-preserving sampling: `DDIM`'s step for a rectified flow, with noise in place of a part of `eps`.

        x_s = (1 - s) x_0 + sqrt(s^2 - std^2) eps + std z,  eps = (x_t - (1 - t) x_0) / t
        std = s sin(noise_level pi / 2),  z ~ N(0, I)

    The sum of the squared coefficients of noise is `s^2`, as in the schedule, so that samples contain no remaining
    noise. The marginals are not those of the flow: on Gaussian data of standard deviation 0.300 and with
    `noise_level` 0.7, samples have the standard deviations 0.209, 0.241 and 0.251 after 10, 40 and 160 steps
    (`FlowSDE`: 0.281, 0.296, 0.299).

    With `noise_level` 1, all noise is new: `x_s = (1 - s) x_0 + s z`, the multistep sampling of consistency models.

    Args:
        num_steps: Number of network calls.
        noise_level: Fraction of the noise that is new, in [0, 1]; 0 is `FlowEuler`.

    Raises:
        ConfigurationError: `noise_level` is out of range.

    References:
        Wang and Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching", arXiv:2509.05952.
    """

    def __init__(self, num_steps: int = 10, noise_level: float = 0.7) -> None:
        super().__init__(num_steps)
        self.noise_level = in_range("noise_level", noise_level, 0, 1)

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the Gaussian of one step; the last step, to 0, adds no noise."""
        std = s * math.sin(self.noise_level * math.pi / 2)
        eps = (x - (1 - t) * x0) / t
        return Transition((1 - s) * x0 + math.sqrt(max(0.0, s**2 - std**2)) * eps, std), None
