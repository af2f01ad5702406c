"""Images of several objects, or of one object on a colored background, with captions, for count and layout rewards.

| caption | image |
|---|---|
| `noto cat` | the emoji on white |
| `cat` | the same, in either style |
| `noto two cat` | two copies at 36/64 of the size, top left and bottom right |
| `noto cat on blue` | the emoji at 48/64 of the size on a background of that color |
| `noto cat and dog` | the first top left, the second bottom right, at 36/64 of the size |
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.emoji_model.data import Emoji

COLORS = {
    "red": (0.89, 0.29, 0.27),
    "yellow": (0.98, 0.84, 0.31),
    "green": (0.40, 0.75, 0.42),
    "blue": (0.33, 0.58, 0.91),
    "purple": (0.62, 0.43, 0.80),
}
PARTS_OF_64 = {"pair": 36, "ground": 48}


@dataclass(frozen=True)
class Scene:
    """The scene that a caption describes.

    Attributes:
        style: `"noto"`, `"twemoji"`, or empty for a bare name, which matches both styles.
        names: One name, or two for a pair; "two NAME" repeats the name.
        color: A key of `COLORS`, or empty for a white background.
    """

    style: str
    names: tuple[str, ...]
    color: str = ""

    @property
    def kind(self) -> str:
        """`single`, `bare`, `two`, `ground` or `pair`."""
        if len(self.names) == 2:
            return "two" if self.names[0] == self.names[1] else "pair"
        return "ground" if self.color else "single" if self.style else "bare"

    @property
    def caption(self) -> str:
        """The caption; `parse` inverts it."""
        first = f"{self.style} " if self.style else ""
        if self.kind == "two":
            return f"{first}two {self.names[0]}"
        return first + " and ".join(self.names) + (f" on {self.color}" if self.color else "")

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """Parse a caption; names that contain " on " or " and " are not supported."""
        style, _, rest = caption.partition(" ")
        if style not in ("noto", "twemoji"):
            style, rest = "", caption
        if rest.startswith("two "):
            return cls(style, (rest[4:],) * 2)
        name, _, color = rest.partition(" on ")
        return cls(style, tuple(name.split(" and ")), color)


def render(scene: Scene, emoji: Emoji, style: str = "") -> Tensor:
    """Render `scene` as `(3, S, S)` in [0, 1]; a bare name has the style `style`."""
    size = emoji.rgba.shape[-1]
    images = [emoji.rgba[emoji.row(scene.style or style, name)] for name in scene.names]
    ground = torch.tensor(COLORS[scene.color]).view(3, 1, 1) if scene.color else torch.ones(3, 1, 1)
    canvas = ground.expand(3, size, size).clone()
    for image, (top, left, side) in zip(images, boxes(scene, size), strict=True):
        _paste(canvas, image, top, left, side)
    return canvas


def boxes(scene: Scene, size: int) -> list[tuple[int, int, int]]:
    """Return (top, left, side) of each object in `scene`, in pixels of an image of `size`."""
    if scene.kind in ("two", "pair"):
        side = size * PARTS_OF_64["pair"] // 64
        return [(0, 0, side), (size - side, size - side, side)]
    if scene.kind == "ground":
        side = size * PARTS_OF_64["ground"] // 64
        return [((size - side) // 2,) * 2 + (side,)]
    return [(0, 0, size)]


def resize(images: Tensor, side: int) -> Tensor:
    """Resize `(N, C, S, S)` to `side`, anti-aliased."""
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _paste(canvas: Tensor, rgba: Tensor, top: int, left: int, side: int) -> None:
    """Composite one image, premultiplied `(4, S, S)`, onto `canvas` in place."""
    small = rgba if side == rgba.shape[-1] else resize(rgba[None], side)[0]
    region = canvas[:, top : top + side, left : left + side]
    region.mul_(1 - small[3:]).add_(small[:3])
