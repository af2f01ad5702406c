"""The interface of diffusion models: prompts to conditioning, noise to `x_0`, latents to images."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.gradients import scale_gradient
from lightning_draft.schedules import Schedule

Prediction = Literal["epsilon", "v_prediction", "flow", "sample"]


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of the network for a batch of prompts.

    Args:
        tensors: Embeddings and masks by name, with the batch as first dimension.
        ragged: Tensors whose shape differs between prompts, by name: one per prompt.
        negative: The conditioning of the negative prompt of classifier-free guidance, if the model uses one.
    """

    tensors: Mapping[str, Tensor]
    ragged: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    negative: "Conditioning | None" = None

    def __len__(self) -> int:
        """Return the batch size."""
        sizes = [*map(len, self.tensors.values()), *map(len, self.ragged.values())]
        return sizes[0]

    def __getitem__(self, rows: slice) -> "Conditioning":
        """Return a slice of the batch."""
        return Conditioning(
            {name: tensor[rows] for name, tensor in self.tensors.items()},
            {name: each[rows] for name, each in self.ragged.items()},
            None if self.negative is None else self.negative[rows],
        )

    def concatenate(self, *others: "Conditioning") -> "Conditioning":
        """Return this batch followed by the others, without their `negative`."""
        batches = (self, *others)
        return Conditioning(
            {name: torch.cat([batch.tensors[name] for batch in batches]) for name in self.tensors},
            {name: sum((batch.ragged[name] for batch in batches), ()) for name in self.ragged},
        )

    def repeat(self, copies: int) -> "Conditioning":
        """Return `copies` copies of the batch, one after the other."""
        repeated = self.concatenate(*[self] * (copies - 1))
        return repeated if self.negative is None else replace(repeated, negative=self.negative.repeat(copies))

    def to(self, dtype: torch.dtype) -> "Conditioning":
        """Return a copy with floating-point tensors in another dtype; masks and `negative` are not changed."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return Conditioning(
            {name: cast(tensor) for name, tensor in self.tensors.items()},
            {name: tuple(map(cast, each)) for name, each in self.ragged.items()},
            self.negative,
        )


class DiffusionModel(nn.Module, ABC):
    """A denoiser with its text encoder and decoder, whose output is converted to a prediction of `x_0`.

    Attributes:
        schedule: The forward process.
        prediction: What the network predicts: the noise, the velocity, the flow or the sample.
        block_checkpointing: Whether the backward pass recomputes the activations inside the network's blocks; set by
            `checkpoint_blocks`.
    """

    schedule: Schedule
    prediction: Prediction
    block_checkpointing: bool = False

    @property
    def source(self) -> str:
        """Where the model comes from, for messages and file headers."""
        return type(self).__name__

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, without a graph."""

    @abstractmethod
    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample standard Gaussian starting latents, float32 `(batch_size, ...)`, on the model's device."""

    @abstractmethod
    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the network's prediction after guidance, in the dtype of `x`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into float32 images `(B, 3, H, W)`, in [0, 1] by convention and not clamped."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at each step; the model itself if it wraps no other network."""
        return self

    @property
    def decoder(self) -> nn.Module | None:
        """The network that decodes latents, if there is one."""
        return None

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """Set whether the backward pass recomputes the activations inside the network's blocks.

        The sampling chain calls this before each network call with gradient, with `Recompute.blocks`.

        Raises:
            ConfigurationError: The network has no blocks that can be recomputed.
        """
        if enabled:
            raise ConfigurationError(
                f'{type(self).__name__} has no blocks to recompute; write checkpointing="step" or "none"'
            )

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context, use the original weights of the model, before any training."""
        raise NotImplementedError(f"{type(self).__name__} does not implement base(), its original weights")
        yield

    def on_sharded(self) -> None:  # noqa: B027
        """Shard what the model stores beside the denoiser; called when the denoiser was sharded over processes."""

    @contextmanager
    def at_step(self, step: int, num_steps: int) -> Iterator[None]:
        """Within this context, network calls belong to one step of a chain, for which adapters may have another scale.

        Args:
            step: Number of the step, from 0, the noisiest one.
            num_steps: Number of steps of the chain.
        """
        yield

    def without_gradient(self) -> AbstractContextManager[None]:
        """Return a context of several network calls without gradient, in which the model may use a faster form."""
        return nullcontext()

    def denoise(
        self, x: Tensor, t: float, conditioning: Conditioning, *, input_gain: float = 1.0, output_gain: float = 1.0
    ) -> Tensor:
        """Estimate `x_0`, `(B, ...)`.

        The gains change only gradients through the network; the conversion to `x_0` keeps `x` attached.

        Args:
            x: The latent at time `t`.
            t: Time in the schedule's units.
            conditioning: From `encode`.
            input_gain: Factor on the gradient of the network's input: 1 attached, 0 detached.
            output_gain: Factor on the gradient of the network's output; with 0 the network builds no graph.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_gain != 0):
            raw = self(scale_gradient(x, input_gain), t, conditioning)
        return to_x0(scale_gradient(raw, output_gain), x, *self.schedule.coefficients(t), self.prediction)


def to_x0(raw: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """Convert a prediction at `x = alpha x_0 + sigma eps` into one of `x_0`.

    With `r` the network's output: `(x - sigma r) / alpha` for epsilon, `alpha x - sigma r` for v_prediction,
    `x - sigma r` for flow, and `r` for sample.
    """
    if prediction == "epsilon":
        return (x - sigma * raw) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * raw
    if prediction == "flow":
        return x - sigma * raw
    if prediction == "sample":
        return raw
    raise ConfigurationError(f"prediction={prediction!r} is not valid; write epsilon, v_prediction, flow or sample")


def x0_slope(alpha: float, sigma: float, prediction: Prediction) -> float:
    """Return the derivative of `to_x0` with respect to the network's output."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return to_x0(one, zero, alpha, sigma, prediction).item()
