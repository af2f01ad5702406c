"""Image grids with captions, and logging of images with Lightning's loggers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_draft.text import one_line

_GAP = 8
_LINE = 20
_TEXT = 12
_INK = (20, 20, 20)
_PAPER = (255, 255, 255)
_SHADE = (240, 240, 240)


def to_pil_image(image: Tensor, min_size: int = 128) -> Image.Image:
    """Convert a tensor `(3, H, W)` in [0, 1] to a PIL image; small images are enlarged by an integer factor.

    Args:
        image: Values outside [0, 1] are clamped.
        min_size: Least length of the shorter side, in pixels.
    """
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    pil_image = Image.fromarray(pixels)
    factor = -(-min_size // min(pil_image.size))
    return pil_image.resize((pil_image.width * factor, pil_image.height * factor), Image.Resampling.NEAREST)


def comparison(
    prompts: Sequence[str],
    images: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None = None,
    *,
    min_size: int = 128,
    per_row: int = 4,
    title: str = "",
) -> Image.Image:
    """Return a grid with a panel for each prompt: the prompt, its images side by side, and label and score under each.

    Args:
        prompts: `N` prompts.
        images: By label (such as `base` and `fine-tuned`), `(N, 3, H, W)` each, in [0, 1].
        scores: By label, `(N,)` each; by default only the labels are shown.
        min_size: Least length of the shorter side of an image in the grid, in pixels.
        per_row: Panels in a row.
        title: A line above all panels.
    """
    panels = [
        _panel(
            prompt,
            [to_pil_image(batch[i], min_size) for batch in images.values()],
            [(label, "" if scores is None else f"  {float(scores[label][i]):.4g}") for label in images],
        )
        for i, prompt in enumerate(prompts)
    ]
    columns = min(per_row, len(panels))
    rows = -(-len(panels) // columns)
    width, height = panels[0].width + _GAP, panels[0].height + _GAP
    top = _GAP + (_LINE if title else 0)
    grid = Image.new("RGB", (columns * width + _GAP, rows * height + top), _PAPER)
    _write(ImageDraw.Draw(grid), (_GAP, _GAP // 2), title, grid.width - 2 * _GAP)
    for i, panel in enumerate(panels):
        grid.paste(panel, (_GAP + i % columns * width, top + i // columns * height))
    return grid


def log_image(logger: Logger, key: str, image: Image.Image, step: int) -> bool:
    """Log an image with a logger through its documented interface.

    Supported are TensorBoard (`experiment.add_image`), Weights & Biases and other loggers with a method `log_image`,
    MLflow (`experiment.log_image` with a run id) and Comet (`experiment.log_image`).

    Args:
        logger: Any Lightning logger.
        key: Name of the image in the logger.
        image: The image.
        step: Number of finished optimization steps.

    Returns:
        Whether the logger accepts images.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=key, images=[image], step=step)
    elif hasattr(experiment, "add_image"):
        experiment.add_image(key, np.asarray(image), step, dataformats="HWC")
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        experiment.log_image(logger.run_id, image, key=key, step=step)
    elif hasattr(experiment, "log_image"):
        experiment.log_image(image, name=key, step=step)
    else:
        return False
    return True


def _panel(prompt: str, images: list[Image.Image], captions: list[tuple[str, str]]) -> Image.Image:
    width = sum(image.width for image in images) + _GAP * (len(images) + 1)
    height = images[0].height + 2 * _LINE + 2 * _GAP
    panel = Image.new("RGB", (width, height), _SHADE)
    canvas = ImageDraw.Draw(panel)
    _write(canvas, (_GAP, _GAP // 2), prompt, width - 2 * _GAP)
    left = _GAP
    for image, (label, score) in zip(images, captions, strict=True):
        panel.paste(image, (left, _GAP + _LINE))
        _write(canvas, (left, _GAP + _LINE + image.height + _GAP // 2), label, image.width, score)
        left += image.width + _GAP
    return panel


def _write(canvas: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, end: str = "") -> None:
    """Write one line of text and its end, in `width` pixels; only the text before the end is shortened."""
    font = _font()
    canvas.text(place, _shorten(text, font, width - font.getlength(end)) + end, fill=_INK, font=font)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, because Pillow's has no accents, Greek or Cyrillic."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _shorten(text: str, font: Any, width: float) -> str:
    """Shorten `text` to `width` pixels and one line; the time does not depend on its length."""
    start = one_line(text[: 8 * max(1, int(width))])
    if len(start) <= width and font.getlength(start) <= width:
        return start
    start = start[: max(1, int(width))]  # no more characters are visible
    fits = bisect_right(range(len(start) + 1), width, key=lambda length: font.getlength(start[:length] + "...")) - 1
    return start[: max(0, fits)] + "..."
