"""Rewards as functions of the clean latents."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward

LatentReward = Callable[[Tensor], Tensor]
"""Called with clean latents `(B, ...)`; returns scores `(B,)`. The score of a sample depends only on that sample."""


def latent_reward(
    model: DiffusionModel, reward: Reward, prompts: Sequence[str], *, clamp: bool = False
) -> LatentReward:
    """Return the function `r(decode(x_0), prompts)` of the clean latents `x_0`.

    Args:
        model: The model, whose decoder is used.
        reward: The reward.
        prompts: One prompt for each sample of the batch.
        clamp: Clamp the images to [0, 1], as for evaluation; pixels outside then have no gradient.
    """

    def score(latents: Tensor) -> Tensor:
        images = model.decode(latents)
        return reward(images.clamp(0, 1) if clamp else images, prompts)

    return score
