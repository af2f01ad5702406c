"""Image preprocessing of CLIP models on tensors, differentiable and without rounding to bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from lightning_draft.errors import ConfigurationError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """A CLIP image processor on tensors: resize, center crop, normalize.

    Args:
        shortest: Length of the shortest side after resizing, in pixels; or the size (height, width); None for no
            resizing.
        crop: Height and width of the crop; None for no crop. Images that are smaller are padded with black.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, by which images are divided.
        mode: Interpolation, always with antialiasing.
        scale: Factor of images in [0, 1] before the mean is subtracted.
    """

    shortest: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    scale: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read an image processor's configuration.

        Raises:
            ConfigurationError: The resize is not bilinear or bicubic, or is by the longest edge.
        """
        mode = _MODES.get(config.get("resample", 3))
        size = config.get("size", 224)
        if mode is None or (isinstance(size, Mapping) and "longest_edge" in size):
            raise ConfigurationError(
                f"the image processor resizes to size={size} with resample={config.get('resample')}; supported are "
                "shortest_edge or height and width, with resample 2 (bilinear) or 3 (bicubic)"
            )
        if isinstance(size, Mapping):
            size = size["shortest_edge"] if "shortest_edge" in size else _pair(size)
        normalize = config.get("do_normalize", True)
        return cls(
            shortest=size if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            mean=tuple(config["image_mean"]) if normalize else (0.0,) * 3,
            std=tuple(config["image_std"]) if normalize else (1.0,) * 3,
            mode=mode,
            scale=255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images `(B, 3, H, W)` in [0, 1] to the network's input, in the same dtype."""
        height, width = images.shape[-2:]
        size = self._resized(height, width)
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=True)
        if self.crop is not None:
            images = F.pad(images, (*_margins(size[1], self.crop[1]), *_margins(size[0], self.crop[0])))
        return normalize(images * self.scale, self.mean, self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest is None:
            return height, width
        if not isinstance(self.shortest, int):
            return self.shortest
        if height <= width:
            return self.shortest, int(self.shortest * width / height)
        return int(self.shortest * height / width), self.shortest


@dataclass(frozen=True)
class LongestSide:
    """Resize the longest side, pad the other one with black on both sides, and normalize, as HPSv2 does.

    Args:
        size: Height and width of the result, in pixels.
        antialias: Whether downsampling is antialiased, as in torchvision's resize of tensors since version 0.17.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, by which images are divided.
    """

    size: int
    antialias: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images `(B, 3, H, W)` in [0, 1] to `(B, 3, size, size)`, in the same dtype."""
        height, width = images.shape[-2:]
        scale = self.size / max(height, width)
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in (height, width))
            images = F.interpolate(
                images, (height, width), mode="bicubic", align_corners=False, antialias=self.antialias
            )
        rows, columns = self.size - height, self.size - width
        images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return normalize(images, self.mean, self.std)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean and divide by the standard deviation, by channel."""
    shift, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def _pair(size: Mapping[str, int] | int) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _margins(length: int, crop: int) -> tuple[int, int]:
    """Return the padding before and after that changes `length` to `crop`; negative for a crop."""
    before = -((length - crop) // 2) if crop <= length else math.ceil((crop - length) / 2)
    return before, crop - length - before
