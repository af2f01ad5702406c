"""Precision of the rewards' weights and computations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError

Precision = Literal["float32", "bfloat16", "float16"]


def check_precision(dtype: str) -> None:
    """Check the name of a precision.

    Raises:
        ConfigurationError: It is not known.
    """
    if dtype not in get_args(Precision):
        raise ConfigurationError(f"dtype={dtype!r} is not supported; write {', '.join(get_args(Precision))}")


@contextmanager
def full_precision(images: Tensor) -> Iterator[Tensor]:
    """Disable autocast within this context; yield `images` as float32, or unchanged if they are float64."""
    with torch.autocast(images.device.type, enabled=False):
        yield images if images.dtype == torch.float64 else images.float()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within this context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
