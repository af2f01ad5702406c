"""Values are bitwise unchanged; gradients are scaled or replaced."""

import math

import pytest
import torch

from lightning_draft.gradients import scale_gradient, straight_through


def test_scale_gradient_keeps_the_value_and_scales_the_gradient() -> None:
    x = torch.tensor([1.5, -0.0, 1e30, math.inf], dtype=torch.float64, requires_grad=True)
    for gain in (0.25, 1.0, -2.0):
        y = scale_gradient(x, gain)
        assert torch.equal(y, x)
        assert math.copysign(1, y[1].item()) == -1
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.full_like(x, gain))
    assert scale_gradient(x, 1.0) is x
    assert not scale_gradient(x, 0.0).requires_grad


def test_scale_gradient_by_sample() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale_gradient(x, torch.tensor([[0.5], [3.0]])).sum(), x)
    assert torch.equal(gradient, torch.tensor([[0.5] * 3, [3.0] * 3]))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other(scale: float) -> None:
    """Bitwise, even if the estimate differs so much that a difference would round the value."""
    estimate = torch.tensor([3.0, -7.0], requires_grad=True)
    value = scale * torch.tensor([0.1, 0.3])
    y = straight_through(2 * estimate, value)
    assert torch.equal(y, value)
    (gradient,) = torch.autograd.grad((torch.tensor([1.0, 5.0]) * y).sum(), estimate)
    assert torch.equal(gradient, torch.tensor([2.0, 10.0]))
