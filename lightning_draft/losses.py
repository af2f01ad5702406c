"""Maps from reward to loss.

References:
    Xu et al., arXiv:2304.05977, section 4 (the hinge of ReFL); Prabhudesai et al., arXiv:2310.03739 (distance).
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

from lightning_draft.errors import ConfigurationError


class RewardLoss(ABC):
    """Maps scores `(B,)` to losses `(B,)`."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Return the loss of each score."""


class Maximize(RewardLoss):
    """`-scale r`.

    Args:
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Negate."""
        return -self.scale * rewards


class Hinge(RewardLoss):
    """`scale relu(threshold - r)`: images that score above the threshold stop pulling.

    Args:
        threshold: The score that is good enough.
        scale: Positive factor; ReFL's code uses 1e-3.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, threshold: float, scale: float = 1.0) -> None:
        self.threshold = threshold
        self.scale = _positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Clip from below at 0."""
        return self.scale * F.relu(self.threshold - rewards)


class Saturating(RewardLoss):
    """`scale softplus((threshold - r) / width) width`: a hinge with a smooth corner, whose gradient never is exactly 0.

    Args:
        threshold: Where the pull has fallen to a half.
        width: Softness of the corner, in units of the reward.
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, threshold: float, width: float = 1.0, scale: float = 1.0) -> None:
        self.threshold = threshold
        self.width = _positive("width", width)
        self.scale = _positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Softplus."""
        return self.scale * self.width * F.softplus((self.threshold - rewards) / self.width)


class Distance(RewardLoss):
    """`scale |r - target|`: steer to a value instead of upwards.

    Args:
        target: The score to reach.
        scale: Positive factor.

    Raises:
        ConfigurationError: The scale is not positive.
    """

    def __init__(self, target: float, scale: float = 1.0) -> None:
        self.target = target
        self.scale = _positive("scale", scale)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Absolute difference."""
        return self.scale * (rewards - self.target).abs()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigurationError(f"{name}={value} would turn the loss off or upside down; write a positive number")
    return value
