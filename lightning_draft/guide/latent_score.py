"""Rewards as functions of the clean latents."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples

LatentScore = Callable[[Tensor], Tensor]
"""Called with clean latents `(B, ...)`; returns scores `(B,)`. The score of a sample depends only on that sample."""


def latent_score(model: DiffusionModel, reward: Reward, prompts: Sequence[str], *, clamp: bool = False) -> LatentScore:
    """Return the function `r(decode(x_0), prompts)` of the clean latents `x_0`; a `LatentReward` needs no decoder.

    Args:
        model: The model, whose decoder is used.
        reward: The reward.
        prompts: One prompt for each sample of the batch.
        clamp: Clamp the images to [0, 1], as for evaluation; pixels outside then have no gradient.
    """

    def score(latents: Tensor) -> Tensor:
        samples = Samples(latents, model.decode(latents) if reward.uses_images else None)
        return reward(samples.clamped() if clamp else samples, prompts)

    return score
