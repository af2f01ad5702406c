"""Generated samples, as rewards receive them: clean latents and decoded images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from lightning_draft.rewards.inputs import check_images

if TYPE_CHECKING:
    from PIL import Image

Scorable = Union["Samples", Tensor, Sequence["Image.Image"]]
"""What a reward is called with: samples, images `(B, 3, H, W)`, or PIL images."""


@dataclass(frozen=True)
class Samples:
    """A batch of samples of a diffusion model.

    Args:
        latents: Clean latents `(B, ...)`, as the sampling chain ends and before the decoder; None for existing images.
        images: float `(B, 3, H, W)` in about [0, 1]; None if they were not decoded.
    """

    latents: Tensor | None
    images: Tensor | None = None

    @classmethod
    def of(cls, inputs: Scorable) -> "Samples":
        """Return samples as they are, and images as samples without latents.

        Raises:
            ConfigurationError: The images have another type, shape or range.
        """
        return inputs if isinstance(inputs, Samples) else cls(None, check_images(inputs))

    @classmethod
    def concatenate(cls, parts: Sequence["Samples"]) -> "Samples":
        """Return several batches as one, on the CPU."""
        latents = [part.latents.cpu() for part in parts if part.latents is not None]
        images = [part.images.float().cpu() for part in parts if part.images is not None]
        return cls(torch.cat(latents) if latents else None, torch.cat(images) if images else None)

    @property
    def content(self) -> Tensor:
        """The images, or the latents of samples without images."""
        content = self.latents if self.images is None else self.images
        assert content is not None
        return content

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.content.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is computed with respect to the content."""
        return self.content.requires_grad

    def __len__(self) -> int:
        """Return the batch size."""
        return len(self.content)

    def __getitem__(self, rows: slice) -> "Samples":
        """Return a slice of the batch."""
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device) -> "Samples":
        """Return a copy on another device."""
        return self._map(lambda x: x.to(device))

    def clamped(self) -> "Samples":
        """Return a copy with float32 images clamped to [0, 1]."""
        return Samples(self.latents, None if self.images is None else self.images.float().clamp(0, 1))

    def with_content(self, content: Tensor) -> "Samples":
        """Return a copy with other images, or with other latents if there are no images."""
        return Samples(content) if self.images is None else Samples(self.latents, content)

    def leaves(self) -> "Samples":
        """Return a detached copy with respect to which gradients can be computed."""
        return self._map(lambda x: x.detach().requires_grad_())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Samples":
        return Samples(*(None if each is None else change(each) for each in (self.latents, self.images)))
