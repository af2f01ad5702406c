"""Rewards that compare two images of the same prompt."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.blackbox import to_pil

if TYPE_CHECKING:
    from PIL import Image


class PairwiseReward(Reward):
    """A reward that also answers which of two images fits a prompt better.

    A subclass implements `prefer`, and `forward` for scores of single images. The advantage estimators `WinRate` and
    `BradleyTerry` ask for preferences; all other parts of the package use the scores.

    Attributes:
        needs_pairs: Whether the scores are useless for training, so that one of these estimators is necessary.
    """

    differentiable = False
    needs_pairs: bool = False

    @abstractmethod
    def prefer(self, first: "Sequence[Image.Image]", second: "Sequence[Image.Image]", prompts: Sequence[str]) -> Tensor:
        """Return the probabilities `(B,)` that the first image fits its prompt better than the second.

        Args:
            first: `B` images.
            second: `B` images.
            prompts: `B` prompts.
        """

    @torch.no_grad()
    def preferences(self, images: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Compare all pairs of images of each prompt, once each.

        Args:
            images: `(P * group, 3, H, W)` in [0, 1]; `group` consecutive images have the same prompt.
            prompts: One per image.
            group: Number of images per prompt.

        Returns:
            `(P, group, group)`: entry `i, j` is the probability that image `i` is better than image `j`; the diagonal
            is 0.5.
        """
        files = to_pil(images)
        pairs = [(p + i, p + j) for p in range(0, len(files), group) for i, j in combinations(range(group), 2)]
        first, second = ([pair[side] for pair in pairs] for side in (0, 1))
        wins = self.prefer([files[i] for i in first], [files[j] for j in second], [prompts[i] for i in first])
        table = torch.full((len(files) // group, group, group), 0.5)
        for (i, j), win in zip(pairs, wins.tolist(), strict=True):
            table[i // group, i % group, j % group] = win
            table[i // group, j % group, i % group] = 1 - win
        return table
