"""A chain of DDIM with a linear network, and its gradients computed by hand.

With the network `eps = theta x` a step of DDIM is `x_{i+1} = A_i x_i + B_i eps = c_i x_i`, so that every gradient is a
sum over the steps with gradient. `Walk` contains these numbers.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models.base import Prediction
from lightning_draft.prompt import Prompt
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.schedules import VariancePreserving
from lightning_draft.testing import LinearModel, scaled_linear

STEPS, THETA, BATCH = 5, 0.3, 4


def linear(prediction: Prediction = "epsilon", **grid: Any) -> LinearModel:
    return LinearModel(THETA, prediction, scaled_linear(**grid), shape=(2, 3))


def chain_of(model: LinearModel, sampler: Sampler | None = None, seed: int = 0, **options: Any) -> SamplingChain:
    """A batch of four prompts with different weights."""
    prompts = [Prompt("a", {"weight": weight}) for weight in (1.0, 0.5, -1.0, 2.0)]
    generator = torch.Generator().manual_seed(seed)
    return SamplingChain(model, sampler or DDIM(STEPS), model.encode(prompts), generator=generator, **options)


def noise(seed: int = 3) -> Tensor:
    return torch.randn(BATCH, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(latents: Tensor, model: LinearModel) -> float:
    """`d (sum of latents) / d theta`."""
    (found,) = torch.autograd.grad(latents.sum(), model.theta)
    return found.item()


@dataclass
class Walk:
    """`A_i`, `B_i` and the latents `x_0 .. x_N` of a DDIM chain, computed without the package."""

    a: list[float]
    b: list[float]
    x: list[Tensor]
    weight: Tensor

    def sum(self, steps: set[int], attached: bool = True) -> float:
        """`sum_{i in S} B_i x_i prod_{j > i} d x_{j+1} / d x_j`, summed over the batch.

        Args:
            steps: `S`, the steps whose network output carries a gradient.
            attached: Whether the network's input does: then later steps of `S` contribute their Jacobian.
        """
        total = torch.zeros_like(self.x[0])
        for i in steps:
            term = self.b[i] * self.weight * self.x[i]
            for j in range(i + 1, len(self.a)):
                inside = self.b[j] * THETA * self.weight if attached and j in steps else 0.0
                term = term * (self.a[j] + inside)
            total = total + term
        return total.sum().item()


def sample_steps(chain: SamplingChain, start: Tensor, stop: int | None = None) -> Walk:
    """Sample DDIM by hand; at step `stop`, use the predicted `x_0` (`A = 1/a`, `B = -s/a`)."""
    schedule, model = chain.model.schedule, chain.model
    assert isinstance(schedule, VariancePreserving)
    weight = chain.conditioning.tensors["weight"].view(-1, 1, 1)
    result = Walk([], [], [start], weight)
    for i, (t, s) in enumerate(chain.grid):
        abar = schedule.alphas_cumprod[int(t)]
        end = 1.0 if i == stop else schedule.alphas_cumprod[int(s)] if s >= 0 else schedule.final_alpha_cumprod
        if model.prediction == "epsilon":
            a = (end / abar) ** 0.5
            b = (1 - end) ** 0.5 - (end * (1 - abar) / abar) ** 0.5
        else:
            a = (end * abar) ** 0.5 + ((1 - end) * (1 - abar)) ** 0.5
            b = ((1 - end) * abar) ** 0.5 - (end * (1 - abar)) ** 0.5
        result.a.append(a)
        result.b.append(b)
        result.x.append((a + b * THETA * weight) * result.x[-1])
        if i == stop:
            break
    return result


PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
GRIDS = pytest.mark.parametrize(
    "grid",
    [{}, {"final_alpha_cumprod": None}, {"spacing": "leading", "steps_offset": 1}],
    ids=["trailing", "trailing-last-abar", "leading"],
)
