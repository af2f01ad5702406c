"""A sampling chain of a linear model that records the calls of its network."""

from typing import Any

import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models.base import Conditioning, Prediction
from lightning_draft.prompt import Prompt
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.testing import LinearModel

STEPS, THETA = 5, 0.3
WEIGHTS = (1.0, 0.5, -1.0, 2.0)


class Spy(LinearModel):
    """Records for every call the batch size, the prompts' weights, and whether input and output have a gradient."""

    def __init__(self, prediction: Prediction = "epsilon") -> None:
        super().__init__(THETA, prediction, shape=(2, 3))
        self.calls: list[tuple[int, bool, bool]] = []
        self.weights: list[list[float]] = []

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        self.weights.append(conditioning.tensors["weight"].tolist())
        output = super().forward(x, t, conditioning)  # recomputing may end in here
        self.calls.append((len(x), x.requires_grad, output.requires_grad))
        return output


def chain_of(model: LinearModel, sampler: Sampler | None = None, **options: Any) -> SamplingChain:
    prompts = [Prompt("a", {"weight": weight}) for weight in WEIGHTS]
    return SamplingChain(model, sampler or DDIM(STEPS), model.encode(prompts), **options)


def noise(batch: int = 4) -> Tensor:
    return torch.randn(batch, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
