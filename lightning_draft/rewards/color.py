"""Closed-form rewards of color, symmetry and sharpness: examples, and monitors of reward hacking."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import finite
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.precision import full_precision

LUMA = (0.299, 0.587, 0.114)


class Brightness(Reward):
    """`-(mean(x) - target)^2` with the mean over pixels and channels, in [-1, 0] for images in [0, 1].

    Args:
        target: Mean to reach; 0 is black, 1 is white.
    """

    def __init__(self, target: float = 0.5) -> None:
        super().__init__()
        self.target = finite("target", target, "write 0.5")

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images) as x:
            return -((x.mean((1, 2, 3)) - self.target) ** 2)


class ColorTarget(Reward):
    """`-mean((x - color)^2)` over pixels and channels, in [-1, 0] for images and colors in [0, 1].

    The maximum is an image of one color. `ColorBalance` changes the average color only.

    Args:
        red: Red channel of the color.
        green: Green channel.
        blue: Blue channel.
    """

    def __init__(self, red: float = 1.0, green: float = 0.0, blue: float = 0.0) -> None:
        super().__init__()
        self.color = (finite("red", red), finite("green", green), finite("blue", blue))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images) as x:
            return -((x - x.new_tensor(self.color).view(3, 1, 1)) ** 2).mean((1, 2, 3))


class ColorBalance(Reward):
    """`red R + green G + blue B` of the mean color; by default redness, in [-1, 1] for images in [0, 1].

    The reward is linear and has no maximum inside [0, 1]: combine it with another reward or a threshold.

    Args:
        red: Weight of the mean red.
        green: Weight of the mean green.
        blue: Weight of the mean blue.
    """

    def __init__(self, red: float = 1.0, green: float = -0.5, blue: float = -0.5) -> None:
        super().__init__()
        self.weights = (finite("red", red), finite("green", green), finite("blue", blue))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images) as x:
            return (x.mean((2, 3)) * x.new_tensor(self.weights)).sum(1)


class ColorSaturation(Reward):
    """Mean over pixels of the channels' standard deviation, scaled to [0, 1]: 0 for gray, 1 for pure red or yellow.

    The standard deviation `s` is smoothed to `sqrt(s^2 + 0.001^2) - 0.001`, whose gradient is 0 and finite at gray.
    """

    SMOOTHING = 1e-3
    LARGEST = 2**0.5 / 3

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images) as x:
            deviation = (x.var(1, correction=0) + self.SMOOTHING**2).sqrt() - self.SMOOTHING
            return deviation.mean((1, 2)) / self.LARGEST


class Symmetry(Reward):
    """`-mean((x - mirror(x))^2)`, in [-1, 0] for images in [0, 1].

    Args:
        axis: `horizontal` compares left with right, `vertical` compares top with bottom.

    Raises:
        ConfigurationError: The axis is neither.
    """

    DIMENSIONS = {"horizontal": 3, "vertical": 2}

    def __init__(self, axis: Literal["horizontal", "vertical"] = "horizontal") -> None:
        super().__init__()
        if axis not in self.DIMENSIONS:
            raise ConfigurationError(
                f"axis={axis!r} is not known; write horizontal (left-right) or vertical (top-bottom)"
            )
        self.axis = axis

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images) as x:
            return -((x - x.flip(self.DIMENSIONS[self.axis])) ** 2).mean((1, 2, 3))


class Sharpness(Reward):
    """`mean((L * luma)^2)` with the 4-neighbor Laplacian `L`, without the border.

    0 for flat images and linear ramps, at most 16 (a checkerboard of single pixels) for images in [0, 1]; photographs
    have 0.001 to 0.1. Noise scores high: combine it with another reward.
    """

    KERNEL = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, at least 3x3 pixels, to `(B,)`."""
        with full_precision(images) as x:
            luma = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA)).unsqueeze(1)
            laplacian = F.conv2d(luma, x.new_tensor(self.KERNEL).view(1, 1, 3, 3))
            return (laplacian**2).mean((1, 2, 3))
