"""The precision in which rewards compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(images: Tensor) -> Iterator[Tensor]:
    """Within this context autocast is off; yields `images` as float32, or unchanged when they are float64."""
    with torch.autocast(images.device.type, enabled=False):
        yield images if images.dtype == torch.float64 else images.float()
