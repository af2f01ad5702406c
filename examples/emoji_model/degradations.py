"""Clearly visible degradations, which distinguish degraded from clean images.

The strengths are for 64x64 images, and every degradation is preserved by an autoencoder that reduces each side by four.
The noise has coarse grains, because the latents cannot represent white noise.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def blur(image: Tensor) -> Tensor:
    """Convolve `(3, H, W)` with a Gaussian of standard deviation 2.2 to 3.6 pixels."""
    sigma, radius = _uniform(2.2, 3.6), 9
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).float() ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(-1, -2), groups=3)[0]


def noise(image: Tensor) -> Tensor:
    """Add Gaussian noise of standard deviation 0.16 to 0.3 in grains of two to four pixels, colored or gray."""
    channels = 3 if torch.rand(()) < 0.6 else 1
    side = image.shape[-1] // (2 if torch.rand(()) < 0.5 else 4)
    grains = torch.randn(1, channels, side, side) * _uniform(0.16, 0.3)
    return image + F.interpolate(grains, size=image.shape[-2:], mode="nearest")[0]


def jpeg(image: Tensor) -> Tensor:
    """Compress as JPEG of quality 2 to 9 with chroma at half resolution."""
    buffer = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(_uniform(2, 9)), subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).permute(2, 0, 1).float() / 255


def wash(image: Tensor) -> Tensor:
    """Reduce the contrast to 0.3 to 0.55 around a gray of 0.5 to 0.85."""
    contrast, gray = _uniform(0.3, 0.55), _uniform(0.5, 0.85)
    return image * contrast + (1 - contrast) * gray


def cast(image: Tensor) -> Tensor:
    """Scale one channel by 0.35 to 0.6 and the others by 0.55 to 1."""
    tint = torch.empty(3).uniform_(0.55, 1.0)
    tint[torch.randint(3, ())] = _uniform(0.35, 0.6)
    return image * tint.view(3, 1, 1)


def pixelate(image: Tensor) -> Tensor:
    """Reduce to 9 to 14 pixels a side and enlarge again, in blocks or smoothly."""
    side = int(torch.randint(9, 15, ()))
    small = F.interpolate(image[None], size=(side, side), mode="area")
    return F.interpolate(small, size=image.shape[-2:], mode="nearest" if torch.rand(()) < 0.6 else "bilinear")[0]


KINDS: tuple[Callable[[Tensor], Tensor], ...] = (pixelate, blur, wash, cast, noise, jpeg)
"""All degradations, in the order in which two of them are applied."""


def degrade(image: Tensor) -> Tensor:
    """Apply one random degradation, or with probability 0.4 two, to `(3, H, W)` in [0, 1]."""
    chosen = {int(torch.randint(len(KINDS), ()))}
    if torch.rand(()) < 0.4:
        chosen.add(int(torch.randint(len(KINDS), ())))
    for kind in sorted(chosen):
        image = KINDS[kind](image)
    return image.clamp(0, 1)


def degrade_all(images: Tensor) -> Tensor:
    """Degrade each of `(N, 3, H, W)` independently."""
    return torch.stack([degrade(image) for image in images])


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))
