"""Losses: maps from rewards `r` to losses.

References:
    Xu et al., arXiv:2304.05977, section 4 (the hinge of ReFL); Prabhudesai et al., arXiv:2310.03739 (distance).
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import finite, positive


class RewardLoss(ABC):
    """Maps rewards `(B,)` to losses `(B,)`."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Return the loss of each reward."""


class Maximize(RewardLoss):
    """`loss = -scale * r`: maximize the reward.

    Args:
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return `-scale * r`, `(B,)`."""
        return -self.scale * rewards


class Hinge(RewardLoss):
    """`loss = scale * max(0, threshold - r)`: images that score above the threshold have no gradient.

    Args:
        threshold: Reward at and above which the loss is 0.
        scale: Positive factor; ReFL's code uses 1e-3.

    Raises:
        ConfigurationError: The scale is not positive, or the threshold not finite.
    """

    def __init__(self, threshold: float, scale: float = 1.0) -> None:
        self.threshold = finite("threshold", threshold)
        self.scale = positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return `scale * max(0, threshold - r)`, `(B,)`."""
        return self.scale * F.relu(self.threshold - rewards)


class SoftHinge(RewardLoss):
    """`loss = scale * width * softplus((threshold - r) / width)`: a hinge with a smooth corner.

    The slope is `-scale * sigmoid((threshold - r) / width)`.

    Args:
        threshold: Reward at which the slope is half of the maximum.
        width: Width of the transition, in units of the reward; towards 0 the loss becomes `Hinge`.
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale or the width is not positive, or the threshold not finite.
    """

    def __init__(self, threshold: float, width: float = 1.0, scale: float = 1.0) -> None:
        self.threshold = finite("threshold", threshold)
        self.width = positive("width", width)
        self.scale = positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return `scale * width * softplus((threshold - r) / width)`, `(B,)`."""
        return self.scale * self.width * F.softplus((self.threshold - rewards) / self.width)


class Distance(RewardLoss):
    """`loss = scale * |r - target|`: train towards a value of the reward.

    Args:
        target: The reward to reach.
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, target: float, scale: float = 1.0) -> None:
        self.target = target
        self.scale = positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return `scale * |r - target|`, `(B,)`."""
        return self.scale * (rewards - self.target).abs()
