"""Timestep grids of diffusers' schedulers, from the most to the least noise, and times to train at.

References:
    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, table 2.
"""

from typing import Any, Literal, get_args

import numpy as np
import torch

from lightning_draft.arguments import integer_at_least, one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.schedules import Grid, Schedule, Spacing, VariancePreserving

TimeSpread = Literal["grid", "uniform"]


def ddim_timesteps(table: VariancePreserving, steps: int, spacing: Spacing | None = None) -> list[int]:
    """Return the timesteps of `DDIMScheduler`.

    Args:
        table: The model's schedule.
        steps: Number of timesteps.
        spacing: By default that of the schedule.

    Raises:
        ConfigurationError: The timesteps would repeat, or go beyond the table.
    """
    return _checked(_ddim(table, steps, spacing or table.spacing), table)


def dpm_timesteps(table: VariancePreserving, steps: int, spacing: Spacing | None = None) -> list[int]:
    """Return the timesteps of `DPMSolverMultistepScheduler`; arguments and errors are those of `ddim_timesteps`."""
    spacing, total = spacing or table.spacing, table.num_train_timesteps
    if spacing == "leading":
        times = [i * (total // (steps + 1)) + table.steps_offset for i in range(steps, 0, -1)]
    elif spacing == "trailing":
        times = _ddim(table, steps, spacing)
    else:
        times = _integers(np.linspace(0, total - 1, steps + 1).round()[:0:-1])
    return _checked(times, table)


def check_training_times(spread: TimeSpread, count: int, num_steps: int) -> None:
    """Check the options of `training_times`.

    Args:
        spread: The option `times`.
        count: The option `num_times`.
        num_steps: Length of the sampler's grid.

    Raises:
        ConfigurationError: The spread is not known, or there are fewer than 1 or too many times.
    """
    one_of("times", spread, get_args(TimeSpread))
    integer_at_least("num_times", count, 1)
    if spread == "grid" and count > num_steps:
        raise ConfigurationError(
            f"num_times={count} exceeds the sampler's num_steps={num_steps}, and times=grid uses each step once; lower "
            "num_times, or set times to uniform"
        )


def training_times(
    grid: Grid, schedule: Schedule, count: int, spread: TimeSpread, generator: torch.Generator
) -> list[float]:
    """Choose random training times.

    Args:
        grid: The grid of the sampler.
        schedule: The schedule of the model.
        count: Number of times; at most the grid's length for `grid`.
        spread: `grid` chooses from the grid without replacement; `uniform` chooses one time in each of `count` equal
            parts of the schedule.
        generator: Source of the randomness.
    """
    if spread == "grid":
        order = torch.randperm(len(grid), generator=generator)[:count]
        return [grid[index][0] for index in order.tolist()]
    offsets = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return [schedule.time_at((index + offset) / count) for index, offset in enumerate(offsets)]


def _ddim(table: VariancePreserving, steps: int, spacing: Spacing) -> list[int]:
    total = table.num_train_timesteps
    if spacing == "leading":
        return [i * (total // steps) + table.steps_offset for i in reversed(range(steps))]
    if spacing == "trailing":
        # numpy rounds ties as diffusers does; its arange may also return one element too many.
        return _integers(np.arange(total, 0, -total / steps)[:steps].round() - 1)
    return _integers(np.linspace(0, total - 1, steps).round()[::-1])


def _integers(times: Any) -> list[int]:
    return [int(t) for t in times]


def _checked(times: list[int], table: VariancePreserving) -> list[int]:
    last = table.num_train_timesteps - 1
    if times[0] > last or any(s >= t for t, s in zip(times, times[1:], strict=False)):
        raise ConfigurationError(
            f"num_steps={len(times)} does not fit the schedule's timesteps 0..{last} on this grid; lower num_steps or "
            "set the sampler's spacing to trailing"
        )
    return times
