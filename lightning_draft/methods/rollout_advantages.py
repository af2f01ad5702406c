"""Advantages of a rollout's samples, from estimators that use rewards, preferences or images."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, ImageAdvantages
from lightning_draft.distributed import all_gather_objects
from lightning_draft.methods.rollout import slices
from lightning_draft.models.base import DiffusionModel
from lightning_draft.preferences import PreferenceAdvantages
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.pairwise import PairwiseReward


def rollout_advantages(
    estimator: AdvantageEstimator,
    reward: Reward,
    rewards: Tensor,
    prompts: Sequence[str],
    group: int,
    rank: int,
    images: Callable[[], Iterator[Tensor]],
) -> Tensor:
    """Return this process's advantages, `(B,)`, from an estimator that receives the rewards of all processes.

    If the reward is a `PairwiseReward` and the estimator uses preferences, the images of each prompt are compared.

    Args:
        estimator: The estimator.
        reward: The trained reward.
        rewards: `(B,)`.
        prompts: `B` prompts.
        group: Number of consecutive samples with the same prompt.
        rank: This process.
        images: Called for the images of the samples, in parts.
    """
    if isinstance(estimator, ImageAdvantages):
        features = torch.cat([estimator.features(some) for some in images()])
        return estimator.from_features(rewards, features, group).to(rewards)
    if isinstance(estimator, PreferenceAdvantages) and isinstance(reward, PairwiseReward):
        every = torch.cat([some.cpu() for some in images()])
        return estimator.from_preferences(reward.preferences(every, prompts, group)).to(rewards)
    gathered = all_gather_objects((rewards.cpu(), [str(prompt) for prompt in prompts]))
    names = [name for _, each in gathered for name in each]
    advantages = estimator(torch.cat([each for each, _ in gathered]), names, group)
    start = sum(len(each) for _, each in gathered[:rank])
    return advantages[start : start + len(prompts)].to(rewards)


def decoded_parts(model: DiffusionModel, latents: Tensor, size: int | None) -> Iterator[Tensor]:
    """Yield the images of samples `(B, ...)`, float32 and clamped to [0, 1], `size` at a time; by default all."""
    for some in slices(len(latents), size):
        yield model.decode(latents[some]).float().clamp(0, 1)
