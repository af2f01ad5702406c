"""Image processors of transformers on tensors, with gradient, read from their configuration."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.preprocessing import Preprocessing

SUPPORTED = (
    *("Beit", "Bit", "CLIP", "ConvNext", "DeiT", "MobileNetV1", "MobileNetV2", "Siglip", "ViT"),
    *("ConditionalDetr", "DeformableDetr", "Detr", "OwlViT", "Owlv2", "RTDetr", "Yolos"),
)
"""Supported processors. Swin uses ViT's, DINOv2 BiT's, ResNet ConvNeXT's, D-FINE RT-DETR's."""

_GRAY = 0.5


class PixelValues:
    """Convert images in [0, 1] to a network's input as an image processor of transformers does, with gradient.

    Pillow rounds to bytes after each pass of a resize and this class does not: the results differ by about 1/255.

    Args:
        config: The complete configuration of the processor: `processor.to_dict()`.

    Raises:
        ConfigurationError: The processor or its kind of resizing is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.kind = _kind(config)
        if self.kind not in SUPPORTED:
            raise ConfigurationError(
                f"the image processor {config.get('image_processor_type')} is not supported "
                f"on tensors; use a model with one of the processors {', '.join(SUPPORTED)}"
            )
        config = _with_crop(config) if self.kind == "ConvNext" else config
        self.size = _size(config)
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        self.steps = Preprocessing.from_config(
            {**config, "size": {"height": 1, "width": 1}, "do_center_crop": crop is not None, "crop_size": crop}
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Convert `(B, 3, H, W)` to `(B, 3, h, w)`, in the same dtype."""
        if self.steps.shortest is None:
            return self.steps(images)
        if self.kind == "Owlv2":
            images = owlv2_resize(images, self.resized(*images.shape[-2:]))
            return replace(self.steps, shortest=None)(images)
        return replace(self.steps, shortest=self.resized(*images.shape[-2:]))(images)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image is resized before any crop."""
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        shortest: float = self.size["shortest_edge"]
        longest = self.size.get("longest_edge")
        if longest is not None and shortest * max(height, width) > longest * min(height, width):
            shortest = longest * min(height, width) / max(height, width)
        rounded = round(shortest)
        across = int(shortest * max(height, width) / min(height, width))
        size = (rounded, across) if height <= width else (across, rounded)
        return size if self.kind != "Yolos" else (size[0] // 16 * 16, size[1] // 16 * 16)


def read_image_processor(source: Path | str) -> Any:
    """Read the image processor of a folder or hub id.

    Raises:
        OSError, ValueError: There is none.
    """
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)


def owlv2_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as OWLv2 does: pad to a square with gray, smooth with a Gaussian before shrinking, interpolate linearly.

    This is the resize of the model's first implementation and of transformers 4; transformers 5 pads with black.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        size: Height and width of the result.
    """
    height, width = images.shape[-2:]
    side = max(height, width)
    images = F.pad(images, (0, side - width, 0, side - height), value=_GRAY)
    for dim, length in zip((-2, -1), size, strict=True):
        images = _smooth(images, (side / length - 1) / 2, dim)
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=False)


def _smooth(images: Tensor, sigma: float, dim: int) -> Tensor:
    """Convolve with a Gaussian of `sigma` pixels, truncated at 4 sigma, along one dimension, with mirrored borders."""
    radius = int(4 * sigma + 0.5)
    if radius < 1:
        return images
    places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(places**2) / (2 * sigma**2), 0)
    rows = images.movedim(dim, -1)
    flat = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), mode="reflect")
    return F.conv1d(flat, kernel.view(1, 1, -1)).view(rows.shape).movedim(-1, dim)


def _kind(config: Mapping[str, Any]) -> str:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    return kind


def _size(config: Mapping[str, Any]) -> dict[str, int]:
    size = config["size"]
    found = {} if not isinstance(size, Mapping) else {key: int(length) for key, length in size.items() if length}
    if {"height", "width"} <= found.keys() or "shortest_edge" in found:
        return found
    raise ConfigurationError(
        f"the image processor resizes to {size}; supported are height and width, or shortest_edge with or without "
        "longest_edge"
    )


def _with_crop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resize of ConvNeXt and ResNet: below 384 pixels to a larger size with a crop, else to a square."""
    side = config["size"]["shortest_edge"]
    square = {"height": side, "width": side}
    if side >= 384:
        return {**config, "size": square, "do_center_crop": False}
    larger = {"shortest_edge": int(side / config.get("crop_pct", 224 / 256))}
    return {**config, "size": larger, "do_center_crop": True, "crop_size": square}
