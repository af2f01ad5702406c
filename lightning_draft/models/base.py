"""What a diffusion model must offer; guidance, prediction types and adapters end here."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.schedules import Schedule

Prediction = Literal["epsilon", "v_prediction", "flow", "sample"]


@dataclass(frozen=True)
class Conditioning:
    """Tensors that condition the network, each with the batch first."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Batch size."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, part: slice) -> "Conditioning":
        """The same for a slice of the batch."""
        return Conditioning({name: tensor[part] for name, tensor in self.tensors.items()})

    def repeat(self, copies: int) -> "Conditioning":
        """`copies` copies of the batch, one after the other."""
        return Conditioning({name: torch.cat([tensor] * copies) for name, tensor in self.tensors.items()})


class DiffusionModel(nn.Module, ABC):
    """A denoiser with everything around it, normalised so that it predicts `x_0`.

    Attributes:
        schedule: The forward process.
        prediction: What the raw network outputs.
    """

    schedule: Schedule
    prediction: Prediction

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Turn prompts into conditioning, without a graph."""

    @abstractmethod
    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gaussian starting latents, float32 `(batch_size, ...)`, on the model's device."""

    @abstractmethod
    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """The raw network's output after guidance, in the dtype of `x`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 `(B, 3, H, W)`, in [0, 1] by convention and not clamped."""

    def checkpoint_blocks(self) -> None:
        """Recompute the activations inside the network's blocks in the backward pass, from now on."""
        raise ConfigurationError(
            f'{type(self).__name__} has no blocks to recompute; write checkpointing="step" or "none"'
        )

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the model is what it was before any training: adapters are off."""
        raise NotImplementedError(f"{type(self).__name__} cannot switch its adapters off")
        yield

    def denoise(
        self, x: Tensor, t: float, conditioning: Conditioning, *, detach_input: bool = False, freeze: bool = False
    ) -> Tensor:
        """The estimate of `x_0`, `(B, ...)`.

        Args:
            x: The latent at time `t`.
            t: Time in the schedule's units.
            conditioning: From `encode`.
            detach_input: The network sees `x` detached; the conversion to `x_0` keeps it attached.
            freeze: The network's output carries no gradient; the conversion to `x_0` does.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze):
            raw = self(x.detach() if detach_input else x, t, conditioning)
        return to_x0(raw, x, *self.schedule.coefficients(t), self.prediction)


def to_x0(raw: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """Convert a raw prediction at `x = alpha x_0 + sigma eps` into one of `x_0`."""
    if prediction == "epsilon":
        return (x - sigma * raw) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * raw
    if prediction == "flow":
        return x - sigma * raw
    if prediction == "sample":
        return raw
    raise ValueError(f"prediction={prediction!r} is not known; write epsilon, v_prediction, flow or sample")
