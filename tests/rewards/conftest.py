"""Pictures, and finite differences."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_draft.rewards import Reward

Check = Callable[[Reward, Tensor, Sequence[str]], Tensor]


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    """Smooth coloured shapes with a little noise, float32 `(count, 3, height, width)` in [0.1, 0.9], whole bytes."""

    def draw(count: int, height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        noise = 0.05 * torch.randn(count, 3, height, width, generator=generator)
        return (0.2 + 0.6 * smooth + noise).clamp(0.1, 0.9).mul(255).round() / 255

    return draw


@pytest.fixture
def check_gradient() -> Check:
    """Compare the gradient with central differences in float64, along four random directions, and return it."""

    def check(reward: Reward, images: Tensor, prompts: Sequence[str], step: float = 1e-6) -> Tensor:
        reward = reward.double()
        images = images.double().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                above, below = (reward(images + sign * step * direction, prompts).sum() for sign in (1, -1))
            torch.testing.assert_close(
                (gradient * direction).sum(),
                (above - below) / (2 * step),
                rtol=1e-5,
                atol=1e-8 * float(gradient.norm()),
            )
        assert gradient.isfinite().all()
        assert gradient.any()
        return gradient

    return check
