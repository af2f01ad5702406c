"""Models and rewards whose samples and gradients are known in closed form, for tests.

>>> import torch
>>> from lightning_draft.chain import SamplingChain
>>> from lightning_draft.samplers import DDIM
>>> from lightning_draft.truncation import LastK
>>> model = LinearModel(theta=0.2)
>>> chain = SamplingChain(model, DDIM(10), model.encode(["a cat"]))
>>> latents = LastK(2)(chain, model.noise(1, torch.Generator().manual_seed(0)))
>>> model.calls_without_gradient, model.calls_with_gradient
(8, 2)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_draft.arguments import at_least
from lightning_draft.models.base import Conditioning, DiffusionModel, Prediction
from lightning_draft.prompt import metadata_of
from lightning_draft.rewards.base import Reward
from lightning_draft.schedules import Schedule, Spacing, VariancePreserving


def scaled_linear(
    num_train_timesteps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    final_alpha_cumprod: float | None = 1.0,
    spacing: Spacing = "trailing",
    steps_offset: int = 0,
) -> VariancePreserving:
    """Build the schedule of Stable Diffusion 1 and 2, in float64.

    Args:
        num_train_timesteps: Length of the table. The betas are divided by `num_train_timesteps / 1000`, so that a
            longer table discretizes the same process more finely.
        beta_start: First beta of a table of 1000.
        beta_end: Last beta of a table of 1000.
        final_alpha_cumprod: `alpha^2` after the last step; `None` for the table's first entry.
        spacing: Timestep grid.
        steps_offset: Offset added to every timestep of a leading grid.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    table = tuple((1 - betas * 1000 / num_train_timesteps).cumprod(0).tolist())
    return VariancePreserving(
        table, table[0] if final_alpha_cumprod is None else final_alpha_cumprod, spacing, steps_offset
    )


class _Double(DiffusionModel):
    """A model without text encoder and decoder: latents are images, and a prompt is the weight in its metadata."""

    def __init__(self, schedule: Schedule | None, prediction: Prediction, shape: Sequence[int]) -> None:
        super().__init__()
        self.schedule = scaled_linear() if schedule is None else schedule
        self.prediction = prediction
        self.shape = tuple(shape)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the metadata `weight` of each prompt, `(B,)` in float64; 1 by default."""
        weights = [metadata_of(prompt).get("weight", 1.0) for prompt in prompts]
        return Conditioning({"weight": torch.tensor(weights, dtype=torch.float64)})

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample standard Gaussian latents, float32 `(batch_size, *shape)`."""
        return torch.randn(batch_size, *self.shape, generator=generator, dtype=torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents in their own dtype, so that finite differences can be taken in float64."""
        return latents


class LinearModel(_Double):
    """A network that outputs `theta w x`, with `w` the prompt's weight: every sample and gradient is a product.

    With epsilon prediction a step of DDIM multiplies the latent by `c_i = A_i + B_i theta`.

    Args:
        theta: Initial value of the only parameter, a float64 scalar.
        prediction: Kind of prediction of the network.
        schedule: By default `scaled_linear()`.
        shape: Shape of one latent; three channels, as by default, if a reward expects images.

    Attributes:
        theta: The parameter.
        calls_with_gradient: Number of network calls with gradients enabled, including recomputed ones.
        calls_without_gradient: Number of other network calls.
    """

    def __init__(
        self,
        theta: float = 0.1,
        prediction: Prediction = "epsilon",
        schedule: Schedule | None = None,
        shape: Sequence[int] = (3, 4, 4),
    ) -> None:
        super().__init__(schedule, prediction, shape)
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self._initial = theta
        self._in_base = False
        self.calls_with_gradient = 0
        self.calls_without_gradient = 0

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return `theta w x`, in the dtype of `x`."""
        if torch.is_grad_enabled():
            self.calls_with_gradient += 1
        else:
            self.calls_without_gradient += 1
        weight = conditioning.tensors["weight"].to(x).view(-1, *[1] * (x.dim() - 1))
        return (self._initial if self._in_base else self.theta.to(x)) * weight * x

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context `theta` has its initial value."""
        before, self._in_base = self._in_base, True
        try:
            yield
        finally:
            self._in_base = before


class GaussianModel(_Double):
    """The exact denoiser of data `N(mean, std^2)`, element by element; nothing is trained.

    Args:
        mean: Mean of the data.
        std: Standard deviation of the data; 0 is a single point, so that `x_0` is known exactly.
        schedule: Any schedule; by default `scaled_linear()`.
        shape: Shape of one latent.
    """

    def __init__(
        self,
        mean: float = 0.5,
        std: float = 0.3,
        schedule: Schedule | None = None,
        shape: Sequence[int] = (3, 4, 4),
    ) -> None:
        super().__init__(schedule, "sample", shape)
        self.mean = mean
        self.std = at_least("std", std, 0)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the posterior mean of `x_0` given `x_t = x`."""
        alpha, sigma = self.schedule.coefficients(t)
        gain = self.std**2 * alpha / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Do nothing, because the model is never trained."""
        yield

    def marginal(self, t: float) -> tuple[float, float]:
        """Return mean and standard deviation of `x_t`; a negative `t` is the end of the chain."""
        alpha, sigma = self.schedule.coefficients(t)
        return alpha * self.mean, math.sqrt(alpha**2 * self.std**2 + sigma**2)

    def transport(self, x: Tensor, t: float, s: float) -> Tensor:
        """Solve the probability-flow ODE from `x` at `t` to `s`; deterministic samplers converge to it."""
        (mean_t, std_t), (mean_s, std_s) = self.marginal(t), self.marginal(s)
        return mean_s + std_s / std_t * (x - mean_t)


class ConstantReward(Reward):
    """The same score for every image; its gradient exists and is 0.

    Args:
        value: The score.
    """

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return `value`, `(B,)`."""
        return self.value + 0 * images.flatten(1).sum(1)


class LinearReward(Reward):
    """`weight * mean + bias` of each image; its gradient is `weight / (C H W)` everywhere.

    Args:
        weight: Slope.
        bias: Score of a black image.
    """

    def __init__(self, weight: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return `weight * mean pixel + bias`, `(B,)`."""
        return self.weight * images.flatten(1).mean(1) + self.bias
