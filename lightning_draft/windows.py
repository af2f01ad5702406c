"""Windows: add noise, and train, at a few consecutive steps of each rollout, and sample the others without noise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_draft.arguments import integer_at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Grid, Schedule
from lightning_draft.seeds import derive_seed
from lightning_draft.transition import Transition


class StepWindow(ABC):
    """Choose `size` consecutive steps of a rollout, from those at which the sampler adds noise.

    The window depends only on the rollout's number and the seed, so that it is the same on every process and after a
    resume.

    Args:
        size: Number of steps, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = integer_at_least("window.size", size, 1)

    @abstractmethod
    def start(self, number: int, last: int, seed: int) -> int:
        """Return the position of the first step of rollout `number`, in `0..last`."""

    def steps(self, number: int, stochastic: Sequence[int], seed: int = 0) -> list[int]:
        """Return the window of rollout `number`.

        Args:
            number: Number of the rollout in the run, from 0.
            stochastic: The steps at which the sampler adds noise.
            seed: Seed of the run.

        Raises:
            ConfigurationError: There are fewer than `size` such steps.
        """
        if self.size > len(stochastic):
            fix = f"write {len(stochastic)} or less" if stochastic else "use a sampler with noise, such as DDIM(eta=1)"
            raise ConfigurationError(
                f"window.size={self.size} exceeds the {len(stochastic)} sampling steps that add noise; {fix}"
            )
        first = self.start(number, len(stochastic) - self.size, seed)
        return list(stochastic[first : first + self.size])


class SlidingWindow(StepWindow):
    """MixGRPO: a window that moves along the chain, from noise to image, and then starts again.

        first step of rollout n = min(stride c, S - size),  c = floor(n / rollouts) mod (ceil((S - size) / stride) + 1)

    with `S` the number of steps that add noise.

    Args:
        size: Number of steps, at least 1.
        stride: Number of steps by which the window moves, at least 1; by default `size`.
        rollouts: Number of rollouts between two moves, at least 1.

    References:
        Li et al., "MixGRPO", arXiv:2507.21802. In the authors' code the last windows are shorter; here the last one
        starts earlier, so that every rollout has the same number of training steps.
    """

    def __init__(self, size: int = 4, stride: int | None = None, rollouts: int = 25) -> None:
        super().__init__(size)
        self.stride = self.size if stride is None else integer_at_least("window.stride", stride, 1)
        self.rollouts = integer_at_least("window.rollouts", rollouts, 1)

    def start(self, number: int, last: int, seed: int) -> int:
        """Return the position of the first step, which does not depend on the seed."""
        positions = -(-last // self.stride) + 1
        return min(self.stride * (number // self.rollouts % positions), last)


class RandomWindow(StepWindow):
    """Flow-GRPO-Fast: a window at a random position for each rollout.

        first step ~ uniform{0, ..., first - size}

    Args:
        size: Number of steps, at least 1.
        first: The window is one of the first `first` steps, at least `size`; by default of all that add noise.

    References:
        The code of Flow-GRPO, arXiv:2505.05470 (Flow-GRPO-Fast), in which `first` is half of the sampling steps.
    """

    def __init__(self, size: int = 2, first: int | None = None) -> None:
        super().__init__(size)
        self.first = (
            None
            if first is None
            else integer_at_least("window.first", first, size, f"write {size} or more, because window.size is {size}")
        )

    def start(self, number: int, last: int, seed: int) -> int:
        """Return a random position."""
        high = last if self.first is None else min(last, self.first - self.size)
        generator = torch.Generator().manual_seed(derive_seed(seed, number, _WINDOW))
        return int(torch.randint(high + 1, (), generator=generator))


_WINDOW = 2  # distinguishes these random numbers from those of the samples


def noise_at_steps(sampler: Sampler, steps: Sequence[int]) -> Sampler:
    """Return a sampler with noise at the given steps, and without noise at the others.

    Raises:
        ConfigurationError: The sampler does not say what it is without noise.
    """
    return _NoiseAtSteps(sampler, steps)


class _NoiseAtSteps(Sampler):
    def __init__(self, sampler: Sampler, steps: Sequence[int]) -> None:
        super().__init__(sampler.num_steps, sampler.spacing)
        self.sampler, self.steps, self.deterministic_sampler = sampler, frozenset(steps), sampler.deterministic()

    def grid(self, schedule: Schedule) -> Grid:
        """Return the grid of the sampler."""
        return self.sampler.grid(schedule)

    def step(
        self, schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, solver_state: Any = None
    ) -> tuple[Transition, Any]:
        """Return the step of the sampler, or that without noise."""
        times = [start for start, _ in self.grid(schedule)]
        sampler = self.sampler if times.index(t) in self.steps else self.deterministic_sampler
        return sampler.step(schedule, x, x0, t, s, solver_state)
