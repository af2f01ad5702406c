"""Advantages of a rollout's samples, from estimators that use rewards, preferences or images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, ImageAdvantages
from lightning_draft.distributed import all_gather_objects
from lightning_draft.preferences import PreferenceAdvantages
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.pairwise import PairwiseReward


def compares_images(estimator: AdvantageEstimator, reward: Reward) -> bool:
    """Return whether advantages depend on the images of the samples, besides their rewards."""
    compares_pairs = isinstance(estimator, PreferenceAdvantages) and isinstance(reward, PairwiseReward)
    return compares_pairs or isinstance(estimator, ImageAdvantages)


def compared_features(estimator: AdvantageEstimator, images: Tensor) -> Tensor:
    """Return what is compared of images `(B, 3, H, W)` in [0, 1]: features, or for pairs the images on the CPU."""
    return estimator.features(images) if isinstance(estimator, ImageAdvantages) else images.cpu()


def rollout_advantages(
    estimator: AdvantageEstimator,
    reward: Reward,
    rewards: Tensor,
    prompts: Sequence[str],
    group: int,
    rank: int,
    features: Tensor | None,
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
        features: From `compared_features`, `(B, ...)`, if the estimator compares images.
    """
    if features is not None and isinstance(estimator, ImageAdvantages):
        return estimator.from_features(rewards, features, group).to(rewards)
    if features is not None and isinstance(estimator, PreferenceAdvantages) and isinstance(reward, PairwiseReward):
        return estimator.from_preferences(reward.preferences(features, prompts, group)).to(rewards)
    gathered = all_gather_objects((rewards.cpu(), [str(prompt) for prompt in prompts]))
    names = [name for _, each in gathered for name in each]
    advantages = estimator(torch.cat([each for each, _ in gathered]), names, group)
    start = sum(len(each) for each, _ in gathered[:rank])
    return advantages[start : start + len(prompts)].to(rewards)
