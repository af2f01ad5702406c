"""Closed forms against loops in numpy, and against known scores."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Brightness, ColorBalance, ColorSaturation, ColorTarget, Reward, Sharpness, Symmetry

Array = np.ndarray


def brightness(x: Array) -> float:
    return -((x.sum() / x.size - 0.3) ** 2)


def color_target(x: Array) -> float:
    return -sum((x[c, i, j] - (0.9, 0.2, 0.4)[c]) ** 2 for c, i, j in np.ndindex(x.shape)) / x.size


def color_balance(x: Array) -> float:
    return 0.25 * x[0].mean() + 2 * x[1].mean() - x[2].mean()


def saturation(x: Array) -> float:
    spread = [np.sqrt(((pixel - pixel.mean()) ** 2).mean() + 1e-6) - 1e-3 for pixel in x.reshape(3, -1).T]
    return float(np.mean(spread)) * 3 / np.sqrt(2)


def left_right(x: Array) -> float:
    return -float(np.mean([(x[c, i, j] - x[c, i, -1 - j]) ** 2 for c, i, j in np.ndindex(x.shape)]))


def top_bottom(x: Array) -> float:
    return left_right(x.swapaxes(1, 2))


def sharpness(x: Array) -> float:
    y = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    inner = [(i, j) for i in range(1, y.shape[0] - 1) for j in range(1, y.shape[1] - 1)]
    return float(
        np.mean([(y[i - 1, j] + y[i + 1, j] + y[i, j - 1] + y[i, j + 1] - 4 * y[i, j]) ** 2 for i, j in inner])
    )


@pytest.mark.parametrize(
    ("reward", "oracle"),
    [
        (Brightness(0.3), brightness),
        (ColorTarget(0.9, 0.2, 0.4), color_target),
        (ColorBalance(0.25, 2.0, -1.0), color_balance),
        (ColorSaturation(), saturation),
        (Symmetry(), left_right),
        (Symmetry("vertical"), top_bottom),
        (Sharpness(), sharpness),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (5, 11)])
def test_values_equal_the_closed_form(
    reward: Reward, oracle: Callable[[Array], float], size: tuple[int, int], make_images: Callable[..., Tensor]
) -> None:
    images = make_images(3, *size).double()
    scores = reward(images, ["a cat"] * 3)
    assert scores.numpy() == pytest.approx([oracle(image) for image in images.numpy()], rel=1e-9)


def uniform(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([float(red), float(green), float(blue)]).view(1, 3, 1, 1).expand(1, 3, 6, 6)


CHECKERBOARD = ((torch.arange(6).view(6, 1) + torch.arange(6)) % 2).float().expand(1, 3, 6, 6)
RAMP = torch.linspace(0, 1, 6).expand(1, 3, 6, 6)


@pytest.mark.parametrize(
    ("reward", "image", "score"),
    [
        (Brightness(1.0), uniform(1, 1, 1), 0.0),
        (Brightness(1.0), uniform(0, 0, 0), -1.0),
        (ColorTarget(1.0, 0.0, 0.0), uniform(1, 0, 0), 0.0),
        (ColorTarget(1.0, 0.0, 0.0), uniform(0, 1, 1), -1.0),
        (ColorBalance(), uniform(1, 0, 0), 1.0),
        (ColorBalance(), uniform(0, 1, 1), -1.0),
        (ColorBalance(), uniform(0.4, 0.4, 0.4), 0.0),
        (ColorSaturation(), uniform(0.4, 0.4, 0.4), 0.0),
        (ColorSaturation(), uniform(1, 0, 0), 1.0),
        (ColorSaturation(), uniform(1, 1, 0), 1.0),
        (Symmetry(), RAMP.mT, 0.0),
        (Symmetry("vertical"), RAMP, 0.0),
        (Sharpness(), CHECKERBOARD, 16.0),
        (Sharpness(), RAMP, 0.0),
    ],
)
def test_images_of_known_score(reward: Reward, image: Tensor, score: float) -> None:
    assert reward(image, ["a cat"]).item() == pytest.approx(score, abs=3e-3)


def test_saturation_has_a_finite_gradient_at_gray() -> None:
    image = uniform(0.5, 0.5, 0.5).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ColorSaturation()(image, ["a cat"]).sum(), image)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_symmetry_rejects_other_axes() -> None:
    with pytest.raises(ConfigurationError, match="axis='diagonal' is not known; write horizontal"):
        Symmetry("diagonal")  # type: ignore[arg-type]
