"""Which sampling steps a truncation trains, measured by running it on a network of one multiplication."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning, DiffusionModel, Prediction
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Schedule
from lightning_draft.seeds import seeded
from lightning_draft.truncation import Truncation

_DRAWS = 16


class _OffsetPerTime(DiffusionModel):
    """`x_0 = x / 2 + offset_t`, with an offset of 0 at each time `t`."""

    prediction: Prediction = "sample"

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.offsets: dict[float, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"prompt": torch.zeros(len(prompts), 1)})

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(batch_size, 4, 4, 4, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        return 0.5 * x + self.offsets.setdefault(t, torch.zeros((), dtype=torch.float64, requires_grad=True))

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


def trained_steps(truncation: Truncation, sampler: Sampler, schedule: Schedule, seed: int = 0) -> dict[int, float]:
    """Return `mean(d latents / d x_0)` for each step, from 0, whose prediction of `x_0` has a gradient.

    Args:
        truncation: The truncation, which returns the latents.
        sampler: The sampler.
        schedule: The model's noise schedule.
        seed: Seed of the truncation's random choices and of all noise.
    """
    model, generator = _OffsetPerTime(schedule), torch.Generator().manual_seed(seed)
    with seeded(seed, torch.device("cpu")), torch.enable_grad():
        chain = SamplingChain(model, sampler, model.encode([""]), generator=generator)
        latents = truncation(chain, model.noise(1))
        if not latents.requires_grad:
            return {}
        gradients = torch.autograd.grad(latents.mean(), list(model.offsets.values()), allow_unused=True)
    times = [t for t, _ in chain.grid]
    found = zip(model.offsets, gradients, strict=True)
    return {times.index(t): float(gradient) for t, gradient in found if gradient is not None}


def last_step_coefficient(truncation: Truncation, sampler: Sampler, schedule: Schedule) -> float | None:
    """Return `mean(d latents / d eps)` of the last step, with `eps` the network's noise prediction.

    If it is 0, training has no effect. It is infinite for a step that starts from pure noise (`alpha_t` = 0) and uses
    the network.

    Returns:
        `None` if another step has a gradient in one of 16 random choices, or if the truncation needs more of the model
        than the methods of the sampling chain.

    Raises:
        ConfigurationError: The truncation does not fit the sampler.
    """
    grid = sampler.grid(schedule)
    try:
        for seed in range(_DRAWS):
            found = trained_steps(truncation, sampler, schedule, seed)
            if found.keys() != {len(grid) - 1}:
                return None
    except ConfigurationError:
        raise
    except Exception:  # the truncation needs the real model, on which `check_first_step` runs it
        return None
    alpha, sigma = schedule.coefficients(grid[-1][0])
    slope = found[len(grid) - 1]
    return 0.0 if slope == 0 else -slope * (sigma / alpha if alpha > 0 else math.inf)
