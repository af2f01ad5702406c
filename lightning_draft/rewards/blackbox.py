"""Rewards without a gradient: a Python function, and what all black boxes share."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward

ImageFormat = Literal["pil", "numpy", "tensor"]


class PythonFunction(Reward):
    """Scores by a plain Python function `function(images, prompts)`. Black box: for policy gradients or evaluation.

    The function returns one number an image, as a list, an array or a tensor; any range will do, higher is better.
    Prompts are strings, with metadata under `prompt.metadata` where the data has columns.

    Args:
        function: A callable, or where to import it from: `module.function`, found from the current folder too.
        images: What the function is given: `pil`, a list of RGB pictures; `numpy`, uint8 `(B, H, W, 3)`; or `tensor`,
            float32 `(B, 3, H, W)` in [0, 1] on the images' device, without a graph.

    Raises:
        ConfigurationError: There is no such function, or the form is not known.
    """

    differentiable = False

    def __init__(self, function: Callable[..., Any] | str, images: ImageFormat = "pil") -> None:
        super().__init__()
        if images not in get_args(ImageFormat):
            raise ConfigurationError(f"images={images!r} is not known; write {', '.join(get_args(ImageFormat))}")
        self.images = images
        self.function = _import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ConfigurationError(f"{function!r} is not a function; give one that takes images and prompts")

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped, to `(B,)`."""
        scores = self.function(_CONVERTERS[self.images](images), list(prompts))
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return parse_scores(scores, prompts, f"the function {name}").to(images.device)


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images `(B, 3, H, W)`, clamped to [0, 1] and rounded to bytes."""
    return [Image.fromarray(picture) for picture in to_uint8(images)]


def parse_scores(scores: Any, prompts: Sequence[str], source: str) -> Tensor:
    """Scores that came from outside as float32 `(B,)`.

    Args:
        scores: A list, array or tensor of numbers.
        prompts: `B` prompts.
        source: Who gave the scores, for the message.

    Raises:
        ValueError: They are not `B` finite numbers; the message names the prompts.
    """
    try:
        values = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{source} returned {scores!r}, not numbers, for {quote_prompts(prompts)}") from error
    if values.shape != (len(prompts),):
        raise ValueError(
            f"{source} returned shape {tuple(values.shape)} for {len(prompts)} images; return one number an image "
            f"({quote_prompts(prompts)})"
        )
    odd = [prompt for prompt, value in zip(prompts, values.tolist(), strict=True) if not math.isfinite(value)]
    if odd:
        raise ValueError(f"{source} returned scores that are not finite for {quote_prompts(odd)}")
    return values


def quote_prompts(prompts: Sequence[str], most: int = 8) -> str:
    """`the prompts 'a', 'b'`, at most `most` of them written out."""
    rest = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return f"the prompt{'s' * (len(prompts) != 1)} {', '.join(repr(str(prompt)) for prompt in prompts[:most])}{rest}"


def _import_function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigurationError(f"function={path!r} is no import path; write module.function, such as judges.{path}")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the function {path!r} cannot be imported: {error}") from error
    return function


def to_uint8(images: Tensor) -> np.ndarray:
    """uint8 `(B, H, W, 3)`."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


_CONVERTERS: dict[str, Callable[[Tensor], Any]] = {
    "pil": to_pil,
    "numpy": to_uint8,
    "tensor": lambda images: images.detach().float().clamp(0, 1),
}
