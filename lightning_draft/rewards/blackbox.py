"""Rewards without a gradient: a Python function, and the helpers that black-box rewards share."""

import base64
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.arguments import one_of, positive
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.background import run_all
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.inputs import NonFiniteScoreError, quote_prompts

ImageFormat = Literal["pil", "numpy", "tensor"]


class PythonFunction(Reward):
    """Score with a Python function `function(images, prompts)`. Black box: for policy gradients or evaluation.

    The function returns one number per image as a list, an array or a tensor; higher is better, any range is valid.
    Prompts are strings; `prompt.metadata` contains the other columns of the data, if there are any.

    Args:
        function: A callable, or its import path `module.function`; modules in the current folder are found too.
        images: What the function receives: `pil`, a list of RGB images; `numpy`, uint8 `(B, H, W, 3)`; or `tensor`,
            float32 `(B, 3, H, W)` in [0, 1] on the images' device, without gradient.
        time_limit: Seconds for one call, after which the run ends with an error; None for no limit.

    Raises:
        ConfigurationError: There is no such function, or an argument is not valid.
    """

    differentiable = False

    def __init__(
        self,
        function: Callable[..., Any] | str,
        images: ImageFormat = "pil",
        time_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.images = one_of("images", images, get_args(ImageFormat))
        self.function = _import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ConfigurationError(f"{function!r} is not a function; give one that accepts images and prompts")
        self.time_limit = None if time_limit is None else positive("time_limit", time_limit)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped to [0, 1], to `(B,)`."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        scores = self._call(name, _CONVERTERS[self.images](images), list(prompts))
        return parse_scores(scores, prompts, f"the function {name}").to(images.device)

    def _call(self, name: str, images: Any, prompts: list[str]) -> Any:
        if self.time_limit is None:
            return self.function(images, prompts)
        try:
            return run_all([lambda: self.function(images, prompts)], 1, self.time_limit)[0]
        except TimeoutError as error:
            raise TimeoutError(
                f"the function {name} did not return within time_limit={self.time_limit:g} s for "
                f"{quote_prompts(prompts)}; raise time_limit if it needs longer"
            ) from error


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images `(B, 3, H, W)` to a list of PIL images, clamped to [0, 1] and rounded to bytes."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def to_base64(image: Image.Image, encoding: str = "png", quality: int = 95) -> str:
    """Return a PNG or JPEG file of an image as base64 text.

    Args:
        image: The image.
        encoding: `png` or `jpeg`.
        quality: Quality of the JPEG, 1 to 100.
    """
    file = io.BytesIO()
    image.save(file, encoding, **({"quality": quality} if encoding == "jpeg" else {}))
    return base64.b64encode(file.getvalue()).decode("ascii")


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert images `(B, 3, H, W)` to uint8 `(B, H, W, 3)`, clamped to [0, 1] and rounded."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def parse_scores(scores: Any, prompts: Sequence[str], source: str) -> Tensor:
    """Convert scores of a function or a service to float32 `(B,)`.

    Args:
        scores: A list, array or tensor of numbers.
        prompts: `B` prompts.
        source: Where the scores come from, for the message.

    Raises:
        ConfigurationError: They are not `B` numbers; the message names the prompts.
        NonFiniteScoreError: Some are NaN or infinite.
    """
    try:
        values = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigurationError(
            f"{source} returned {_shorten(scores)}, not numbers, for {quote_prompts(prompts)}; return a list of "
            f"{len(prompts)} numbers"
        ) from error
    if values.shape != (len(prompts),):
        raise ConfigurationError(
            f"{source} returned shape {tuple(values.shape)} for {len(prompts)} images; return one number per image "
            f"({quote_prompts(prompts)})"
        )
    bad = [prompt for prompt, finite in zip(prompts, values.isfinite().tolist(), strict=True) if not finite]
    if bad:
        raise NonFiniteScoreError(f"{source} returned scores that are not finite for {quote_prompts(bad)}")
    return values


def _shorten(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _import_function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigurationError(f"function={path!r} is not an import path; write for example my_rewards.{path}")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the function {path!r} cannot be imported: {error}") from error
    return function


_CONVERTERS: dict[str, Callable[[Tensor], Any]] = {
    "pil": to_pil,
    "numpy": to_uint8,
    "tensor": lambda images: images.detach().float().clamp(0, 1),
}
