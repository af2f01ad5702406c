"""JPEG with 4:2:0 chroma on tensors, with the steps of libjpeg, without entropy coding.

References:
    ITU-T T.81, annex A (DCT, quantization) and annex K (tables); libjpeg 6b, `jcprepct.c` and `jdsample.c` (padding and
    triangle upsampling).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.errors import ConfigurationError

LUMA_TABLE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def check_quality(quality: int) -> int:
    """Return `quality` if it is valid.

    Raises:
        ConfigurationError: It is not an integer from 1 to 100.
    """
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ConfigurationError(f"quality={quality} is not a JPEG quality; write an integer from 1 to 100")
    return quality


def quantization_tables(quality: int) -> tuple[Tensor, Tensor]:
    """Return libjpeg's luma and chroma tables `(8, 8)` for a quality, float64, with integer values in 1..255.

    Args:
        quality: 1 (coarse) to 100.

    Raises:
        ConfigurationError: The quality is not valid.
    """
    check_quality(quality)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([LUMA_TABLE, CHROMA_TABLE], dtype=torch.int64).view(2, 8, 8)
    luma, chroma = ((tables * scale + 50) // 100).clamp(1, 255).double()
    return luma, chroma


def dct_matrix() -> Tensor:
    """Return the orthonormal DCT-II matrix of 8 points, float64 `(frequency, sample)`."""
    frequency, sample = torch.arange(8.0, dtype=torch.float64).view(8, 1), torch.arange(8.0, dtype=torch.float64)
    matrix = torch.cos(math.pi * frequency * (2 * sample + 1) / 16) / 2
    matrix[0] /= 2**0.5
    return matrix


@dataclass(frozen=True)
class Coefficients:
    """DCT coefficients by block, `(B, rows, columns, 8, 8)` each, in units of their quantization step.

    Args:
        luma: Coefficients of Y, with an even number of rows and columns.
        cb: Coefficients of the blue difference, with half the rows and columns.
        cr: Coefficients of the red difference, with half the rows and columns.
        size: Height and width of the image in pixels.
    """

    luma: Tensor
    cb: Tensor
    cr: Tensor
    size: tuple[int, int]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Coefficients":
        """Apply `function` to the three planes."""
        return Coefficients(function(self.luma), function(self.cb), function(self.cr), self.size)


class JPEGCodec:
    """The lossy part of JPEG at one quality.

    Args:
        quality: 1 to 100.
    """

    def __init__(self, quality: int) -> None:
        self.quality = quality
        self.luma_table, self.chroma_table = quantization_tables(quality)
        self.dct = dct_matrix()

    def encode(self, images: Tensor) -> Coefficients:
        """Convert images `(B, 3, H, W)` in [0, 1] to coefficients that are not rounded."""
        height, width = images.shape[-2:]
        padded = _replicate(images, height + height % 2, _multiple(width, 16))
        ycbcr = torch.einsum("bchw,yc->byhw", 255 * padded, images.new_tensor(YCBCR))
        luma = _replicate(ycbcr[:, :1], _multiple(height, 16), padded.shape[-1])[:, 0] - 128
        halved = F.avg_pool2d(ycbcr[:, 1:], 2)
        chroma = _replicate(halved, _multiple(height, 16) // 2, halved.shape[-1])
        cb, cr = (self._analyze(plane, self.chroma_table) for plane in chroma.unbind(1))
        return Coefficients(self._analyze(luma, self.luma_table), cb, cr, (height, width))

    def decode(self, coefficients: Coefficients) -> Tensor:
        """Convert coefficients, rounded or not, to images `(B, 3, H, W)` that are not clamped to [0, 1]."""
        height, width = coefficients.size
        luma = self._synthesize(coefficients.luma, self.luma_table)[:, :height, :width] + 128
        chroma = torch.stack(
            [self._synthesize(plane, self.chroma_table) for plane in (coefficients.cb, coefficients.cr)], 1
        )[:, :, : (height + 1) // 2, : (width + 1) // 2]
        doubled = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False, antialias=False)
        ycbcr = torch.cat([luma.unsqueeze(1), doubled[:, :, :height, :width]], 1)
        inverse = torch.linalg.inv(torch.tensor(YCBCR, dtype=torch.float64)).to(ycbcr)
        return torch.einsum("byhw,cy->bchw", ycbcr, inverse) / 255

    def _analyze(self, plane: Tensor, table: Tensor) -> Tensor:
        count, height, width = plane.shape
        blocks = plane.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3)
        dct = self.dct.to(plane)
        return dct @ blocks @ dct.T / table.to(plane)

    def _synthesize(self, blocks: Tensor, table: Tensor) -> Tensor:
        dct = self.dct.to(blocks)
        pixels = dct.T @ (blocks * table.to(blocks)) @ dct
        return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _multiple(length: int, of: int) -> int:
    return -(-length // of) * of


def _replicate(planes: Tensor, height: int, width: int) -> Tensor:
    """Extend `(B, C, h, w)` downwards and to the right with its last row and column."""
    return F.pad(planes, (0, width - planes.shape[-1], 0, height - planes.shape[-2]), mode="replicate")
