"""Checks of the inputs and outputs of rewards."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_draft.arguments import prompt_list
from lightning_draft.errors import ConfigurationError

LARGEST_PIXEL = 8.0
"""Decoded images exceed 1 only slightly. Values above this limit, without negative values, are assumed to be bytes."""


class NonFiniteScoreError(ValueError):
    """A reward returned NaN or an infinite score; the message names the prompts."""


def check_images(images: Any) -> Tensor:
    """Return images as a float tensor `(B, 3, H, W)`.

    Args:
        images: float `(B, 3, H, W)` in about [0, 1], or a list of PIL images of one size, which are converted.

    Raises:
        ConfigurationError: They have another type, shape or range; the message gives the conversion.
    """
    if isinstance(images, (list, tuple)) and images and all(_is_pil(image) for image in images):
        return from_pil(images)
    if not isinstance(images, Tensor):
        raise ConfigurationError(_describe_no_tensor(images))
    if not images.is_floating_point():
        raise ConfigurationError(
            f"images are {_dtype(images)}; rewards need float images in [0, 1]: write images.float() / 255"
        )
    if images.dim() != 4 or images.shape[1] != 3:
        raise ConfigurationError(_describe_shape(tuple(images.shape)))
    _check_range(images)
    return images


def check_prompts(prompts: Any, count: int) -> list[str]:
    """Return the prompts as a list if they are `count` strings.

    Raises:
        ConfigurationError: There is another number of prompts, or one is not a string.
    """
    texts = prompt_list(prompts)
    if len(texts) != count:
        raise ConfigurationError(
            f"{count} images and {len(texts)} prompts were given; give one prompt for each image, such as "
            f"prompts={[str(texts[0])]!r} * {count}"
        )
    return texts


def check_scores(scores: Any, batch_size: int, reward: nn.Module) -> Tensor:
    """Return scores as a float tensor `(batch_size,)`.

    Integers, booleans and half precision are converted to float32; float64 is not changed.

    Raises:
        ConfigurationError: They are not a tensor, or have another shape or type; the message names the reward.
    """
    name = f"{type(reward).__name__}.forward"
    if not isinstance(scores, Tensor):
        raise ConfigurationError(
            f"{name} returned a {type(scores).__name__} for {batch_size} images; return a tensor of shape "
            f"({batch_size},), such as torch.stack of tensors"
        )
    if scores.shape != (batch_size,):
        raise ConfigurationError(
            f"{name} returned shape {tuple(scores.shape)} for {batch_size} images; return one score per image, shape "
            f"({batch_size},)"
        )
    if scores.is_complex():
        raise ConfigurationError(f"{name} returned complex scores; return real numbers, such as scores.real")
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def to_device(scores: Tensor, device: torch.device, reward: nn.Module) -> Tensor:
    """Return scores on the device of the images.

    Raises:
        ConfigurationError: They are on the meta device, which stores no values.
    """
    if scores.is_meta and device.type != "meta":
        raise ConfigurationError(
            f"{type(reward).__name__}.forward returned scores on the meta device, which stores no values; load the "
            "reward's weights, and return scores on the images' device"
        )
    return scores.to(device)


def check_finite(scores: Tensor, images: Tensor, prompts: Sequence[str], reward: nn.Module) -> Tensor:
    """Return the scores if they are finite.

    If a gradient is computed through the reward, a score that is not finite becomes NaN with a warning. The gradient is
    then not finite either, and the training module decides whether to skip the step or to stop.

    Raises:
        NonFiniteScoreError: Some are NaN or infinite and no gradient is computed; the message names their prompts.
    """
    finite = scores.isfinite()
    if bool(finite.all()):
        return scores
    message = _describe_not_finite(scores, images, prompts, type(reward).__name__)
    if not scores.requires_grad:
        raise NonFiniteScoreError(message)
    warnings.warn(message, stacklevel=3)
    return torch.where(finite, scores, scores * math.nan)


def from_pil(images: Sequence[Any]) -> Tensor:
    """Convert PIL images of one size to float32 `(B, 3, H, W)` in [0, 1], transparent images on a white background.

    Raises:
        ConfigurationError: The sizes differ.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ConfigurationError(
            f"the images have different sizes, such as {sizes[0]} and {sizes[1]}; resize them to one size, or score "
            "them one by one"
        )
    arrays = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def quote_prompts(prompts: Sequence[str], most: int = 8) -> str:
    """Return `the prompts 'a', 'b'`, at most `most` of them written out."""
    rest = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return f"the prompt{'s' * (len(prompts) != 1)} {', '.join(repr(str(prompt)) for prompt in prompts[:most])}{rest}"


def _describe_not_finite(scores: Tensor, images: Tensor, prompts: Sequence[str], name: str) -> str:
    bad = [i for i, finite in enumerate(scores.isfinite().tolist()) if not finite]
    reason = (
        "look for a log, a division or a square root of 0 in the reward"
        if bool(images[bad].isfinite().all())
        else "the images themselves are not finite: the model diverged; lower the learning rate"
    )
    return (
        f"{name} gave a score that is not finite ({scores[bad[0]].item()}) for "
        f"{quote_prompts([prompts[i] for i in bad])}; {reason}"
    )


def _check_range(images: Tensor) -> None:
    if images.numel() == 0:
        raise ConfigurationError(
            f"images have shape {tuple(images.shape)}, which contains no pixels; give at least one"
        )
    low, high = (value.item() for value in images.detach().aminmax())
    if low >= 0 and LARGEST_PIXEL < high < math.inf:
        raise ConfigurationError(
            f"images have values up to {high:.4g}; rewards need images in [0, 1]: write images / 255"
        )


def _describe_no_tensor(images: Any) -> str:
    wanted = "rewards need a float tensor (B, 3, H, W) in [0, 1] or a list of PIL images"
    if _is_pil(images):
        return f"images are one PIL image; {wanted}: write [image]"
    if isinstance(images, np.ndarray):
        scale = " / 255" if images.dtype.kind in "ui" else ""
        order = ".permute(0, 3, 1, 2)" if images.ndim == 4 and images.shape[-1] == 3 else ""
        return (
            f"images are a numpy array of shape {images.shape}; {wanted}: write "
            f"torch.from_numpy(images){order}.float(){scale}"
        )
    if isinstance(images, (list, tuple)):
        kinds = sorted({type(image).__name__ for image in images})
        if not kinds:
            return f"images are an empty list; {wanted}"
        stack = "torch.from_numpy(numpy.stack(images))" if kinds == ["ndarray"] else "torch.stack(images)"
        return f"images are a list of {', '.join(kinds)}; {wanted}: write {stack}"
    return f"images are of type {type(images).__name__}; {wanted}"


def _describe_shape(shape: tuple[int, ...]) -> str:
    fix = "give three color channels"
    if len(shape) == 3:
        fix = "write images.unsqueeze(0)" if shape[0] == 3 else "write images.permute(2, 0, 1).unsqueeze(0)"
    elif len(shape) == 4 and shape[-1] == 3:
        fix = "write images.permute(0, 3, 1, 2)"
    elif len(shape) == 4 and shape[1] == 1:
        fix = "write images.expand(-1, 3, -1, -1)"
    elif len(shape) == 4 and shape[1] == 4:
        fix = "write images[:, :3]; four channels are an alpha channel or latents that are not decoded"
    return f"images have shape {shape}; rewards need (B, 3, H, W): {fix}"


def to_rgb(image: Any) -> Any:
    """Convert a PIL image to mode RGB; 16 bits are scaled to 8, and transparent images get a white background.

    Raises:
        ConfigurationError: The pixels are floating-point numbers, whose range is not known.
    """
    from PIL import Image

    if image.mode == "F":
        raise ConfigurationError("the image has floating-point pixels, whose range is not known; save it with 8 bits")
    if image.mode.startswith("I"):  # convert("RGB") would clip the values at 255
        image = Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _is_pil(image: Any) -> bool:
    from PIL import Image

    return isinstance(image, Image.Image)


def _dtype(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")
