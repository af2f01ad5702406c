"""Draw images with captions in a grid, and log them with Lightning's loggers."""

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

from lightning_draft.callbacks.common import printable

_GAP = 8
_LINE = 20
_TEXT = 12
_INK = (20, 20, 20)
_PAPER = (255, 255, 255)
_SHADE = (240, 240, 240)


def to_picture(image: Tensor, min_size: int = 128) -> Image.Image:
    """Convert a tensor `(3, H, W)` in [0, 1] to a PIL image; a small one is enlarged by a whole factor.

    Args:
        image: Values outside [0, 1] are clamped.
        min_size: The shorter side is at least this long, in pixels.
    """
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    factor = -(-min_size // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def comparison(
    prompts: Sequence[str],
    images: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None = None,
    *,
    min_size: int = 128,
    per_row: int = 4,
    title: str = "",
) -> Image.Image:
    """Draw a panel for each prompt: the prompt, its images side by side, and label and score under each.

    Args:
        prompts: `N` prompts.
        images: By label (such as `base` and `tuned`), `(N, 3, H, W)` each, in [0, 1].
        scores: By label, `(N,)` each; without them only the labels are drawn.
        min_size: The shorter side of a picture is at least this long, in pixels.
        per_row: Panels in a row.
        title: A line above all panels.
    """
    panels = [
        _panel(
            prompt,
            [to_picture(batch[i], min_size) for batch in images.values()],
            [label if scores is None else f"{label}  {float(scores[label][i]):.4g}" for label in images],
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


def log_picture(logger: Logger, key: str, picture: Image.Image, step: int) -> bool:
    """Give a picture to a logger through its documented interface.

    Supported are TensorBoard (`experiment.add_image`), Weights & Biases and other loggers with a method `log_image`,
    MLflow (`experiment.log_image` with a run id) and Comet (`experiment.log_image`).

    Args:
        logger: Any Lightning logger.
        key: The name of the picture in the logger.
        picture: The picture.
        step: Number of finished optimization steps.

    Returns:
        Whether the logger accepts pictures.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=key, images=[picture], step=step)
    elif hasattr(experiment, "add_image"):
        experiment.add_image(key, np.asarray(picture), step, dataformats="HWC")
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        experiment.log_image(logger.run_id, picture, key=key, step=step)
    elif hasattr(experiment, "log_image"):
        experiment.log_image(picture, name=key, step=step)
    else:
        return False
    return True


def _panel(prompt: str, pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) + 1)
    height = pictures[0].height + 2 * _LINE + 2 * _GAP
    panel = Image.new("RGB", (width, height), _SHADE)
    draw = ImageDraw.Draw(panel)
    _write(draw, (_GAP, _GAP // 2), prompt, width - 2 * _GAP)
    left = _GAP
    for picture, caption in zip(pictures, captions, strict=True):
        panel.paste(picture, (left, _GAP + _LINE))
        _write(draw, (left, _GAP + _LINE + picture.height + _GAP // 2), caption, picture.width)
        left += picture.width + _GAP
    return panel


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Draw one line of text, shortened to `width` pixels."""
    font = _font()
    draw.text(place, _shorten(text, font, width), fill=_INK, font=font)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The font in matplotlib: Pillow's own has no accents, Greek or Cyrillic."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _shorten(text: str, font: Any, width: float) -> str:
    """Shorten `text` to `width` pixels and one line; the time does not depend on its length."""
    start = printable(text[: 8 * max(1, int(width))])
    if len(start) <= width and font.getlength(start) <= width:
        return start
    start = start[: max(1, int(width))]  # no more characters are visible
    fits = bisect_right(range(len(start) + 1), width, key=lambda length: font.getlength(start[:length] + "...")) - 1
    return start[: max(0, fits)] + "..."
