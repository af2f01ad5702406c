"""Scale or replace the gradient of a tensor without changing its value."""

from typing import Any

import torch
from torch import Tensor


def scale_gradient(x: Tensor, gain: float | Tensor) -> Tensor:
    """Return `x` with its gradient multiplied by `gain`.

    Args:
        x: Any tensor.
        gain: 1 returns `x` itself, 0 returns `x` detached; a tensor must broadcast to the shape of `x`.
    """
    if isinstance(gain, Tensor):
        return _scaled(x, gain)
    if gain == 1:
        return x
    return x.detach() if gain == 0 else _scaled(x, gain)


def straight_through(estimate: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with the value of `value` and the gradient of `estimate`."""
    return _StraightThrough.apply(estimate, value.detach())  # type: ignore[no-any-return, no-untyped-call]


def _scaled(x: Tensor, gain: float | Tensor) -> Tensor:
    return _ScaleGradient.apply(x, gain)  # type: ignore[no-any-return, no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    """Autograd function, because `x.detach() + gain * (x - x.detach())` turns infinities into NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float | Tensor) -> Tensor:
        ctx.gain = gain
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.gain * gradient, None


class _StraightThrough(torch.autograd.Function):
    """Autograd function, because `estimate + (value - estimate).detach()` rounds the value."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
