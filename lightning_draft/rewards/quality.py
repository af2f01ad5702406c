"""Image quality, by a small classifier that was trained on clean and degraded images."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_draft.arguments import boolean
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.precision import full_precision
from lightning_draft.rewards.pretrained import reading

_EXPECTED = (
    "a quality classifier (config.json with `architecture` and `size`, model.safetensors), such as emoji64-judge"
)


class ImageQuality(Reward):
    """Log-probability that an image is clean: `log sigmoid(f(x))`, at most 0, of a small classifier `f`.

    The gradient vanishes for images that are almost certainly clean, so that training does not raise the logit by
    changes that no longer improve the image. The prompt is ignored.

    Args:
        pretrained: Folder with `config.json` and `model.safetensors`, or the shipped names `emoji64-judge` (trained on)
            and `emoji64-judge-eval` (for evaluation).
        bounded: False returns the logit `f(x)` instead.

    Raises:
        ConfigurationError: There is no classifier, or its architecture is not known.
    """

    def __init__(self, pretrained: str, bounded: bool = True) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.bounded = boolean("bounded", bounded)
        with reading("judge", pretrained, _EXPECTED) as source:
            folder = Path(source)
            config = json.loads((folder / "config.json").read_text())
            self.size = int(config["size"])
            self.network = network(config["architecture"])
            self.network.load_state_dict(load_file(folder / "model.safetensors"))
        self.network.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`; images of another size are resized."""
        logits = self.logits(images)
        return F.logsigmoid(logits) if self.bounded else logits

    def logits(self, images: Tensor) -> Tensor:
        """Return `f(x)`, float32 `(B,)`; above 0 the image is more probably clean than degraded."""
        with full_precision(images) as x:
            if x.shape[-2:] != (self.size, self.size):
                x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
            weight = next(self.network.parameters())
            scores: Tensor = self.network((x * 2 - 1).to(weight.dtype)).squeeze(1)
            return scores


class CleanFraction(ImageQuality):
    """1 if the classifier rates the image as clean (`f(x) > 0`), else 0; the mean is the fraction. Black box.

    Args:
        pretrained: As in `ImageQuality`.
    """

    differentiable = False

    def __init__(self, pretrained: str) -> None:
        super().__init__(pretrained)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped to [0, 1], to `(B,)`."""
        return (self.logits(images.clamp(0, 1)) > 0).float()


def network(architecture: str) -> nn.Sequential:
    """Return an untrained classifier: images `(B, 3, S, S)` in [-1, 1] to logits `(B, 1)`.

    Args:
        architecture: `convnet` (strided convolutions, group norm, global average; any size) or `resnet` (residual
            blocks, batch norm, max pooling; 64x64).

    Raises:
        ConfigurationError: The architecture is not known.
    """
    if architecture == "convnet":
        return _convnet()
    if architecture == "resnet":
        return _resnet()
    raise ConfigurationError(f"architecture={architecture!r} is not known; write convnet or resnet")


def _convnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel, stride in ((24, 5, 2), (32, 3, 1), (48, 3, 2), (48, 3, 1), (96, 3, 2), (96, 3, 1)):
        layers += [nn.Conv2d(channels, width, kernel, stride, kernel // 2), nn.GroupNorm(8, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))


def _resnet(width: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.MaxPool2d(2)]
    for _ in range(3):
        layers += [_Residual(width), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))


class _Residual(nn.Module):
    """`x + conv(relu(conv(relu(norm(x)))))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        out: Tensor = x + self.layers(x)
        return out
