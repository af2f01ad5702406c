"""Loss maps: values and derivatives at known rewards."""

import math

import pytest
import torch

from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Distance, Hinge, Maximize, RewardLoss, SoftHinge

REWARDS = (-1.0, 0.5, 2.0, 40.0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "values", "slopes"),
    [
        (Maximize(), (1.0, -0.5, -2.0, -40.0), (-1.0,) * 4),
        (Maximize(3.0), (3.0, -1.5, -6.0, -120.0), (-3.0,) * 4),
        (Hinge(1.0), (2.0, 0.5, 0.0, 0.0), (-1.0, -1.0, 0.0, 0.0)),
        (Hinge(1.0, scale=1e-3), (2e-3, 5e-4, 0.0, 0.0), (-1e-3, -1e-3, 0.0, 0.0)),
        (
            SoftHinge(1.0, width=0.5, scale=2.0),
            tuple(softplus((1 - r) / 0.5) for r in REWARDS),
            tuple(-2 * sigmoid((1 - r) / 0.5) for r in REWARDS),
        ),
        (Distance(1.0), (2.0, 0.5, 1.0, 39.0), (-1.0, -1.0, 1.0, 1.0)),
        (Distance(1.0, scale=0.5), (1.0, 0.25, 0.5, 19.5), (-0.5, -0.5, 0.5, 0.5)),
    ],
)
def test_values_and_slopes_equal_the_closed_form(
    loss: RewardLoss, values: tuple[float, ...], slopes: tuple[float, ...]
) -> None:
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    losses = loss(rewards)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    torch.testing.assert_close(losses.detach(), torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))


def test_soft_hinge_approaches_the_hinge_as_its_width_goes_to_0() -> None:
    rewards = torch.linspace(-3, 3, 25, dtype=torch.float64)
    narrow, wide, hinge = (loss(rewards) for loss in (SoftHinge(1.0, 1e-3), SoftHinge(1.0, 1.0), Hinge(1.0)))
    torch.testing.assert_close(narrow, hinge, rtol=0, atol=1e-3 * math.log(2))
    assert (wide > hinge).all()


def test_soft_hinge_has_half_its_slope_at_the_threshold() -> None:
    reward = torch.tensor([0.7], requires_grad=True)
    (gradient,) = torch.autograd.grad(SoftHinge(0.7, width=0.1).__call__(reward).sum(), reward)
    assert gradient.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    "build",
    [
        Maximize,
        lambda scale: Hinge(0.0, scale),
        lambda scale: SoftHinge(0.0, 1.0, scale),
        lambda scale: Distance(0.0, scale),
    ],
)
def test_non_positive_scale_is_rejected(build, scale: float) -> None:
    with pytest.raises(ConfigurationError, match=f"scale={scale} must be a positive number"):
        build(scale)


def test_non_positive_width_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match="width=0 must be a positive number"):
        SoftHinge(0.0, width=0)
