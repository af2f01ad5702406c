"""Recognize a generated emoji by the nearest training image."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.emoji_model.data import Emoji
from lightning_draft.rewards import Reward


class NearestPicture(Reward):
    """1 where the nearest picture (L2 over the pixels) shows what the prompt names, in either style, else 0. Black box.

    It compares pixels with those of the training images, without a network that training could exploit.

    Args:
        file: What `examples.emoji_model.data` prepared.
    """

    differentiable = False

    def __init__(self, file: str) -> None:
        super().__init__()
        emoji = Emoji.load(Path(file))
        rows = torch.nonzero(emoji.drawn & ~emoji.held_out).squeeze(1)
        self.names = [emoji.names[row] for row in rows.tolist()]
        self.register_buffer("pictures", emoji.images[rows], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` of the pictures' size and `B` prompts, names with or without a style, to `(B,)`."""
        nearest = torch.cdist(images.float().flatten(1), self.pictures.flatten(1)).argmin(1).tolist()
        right = [_name(prompt) == self.names[row] for prompt, row in zip(prompts, nearest, strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=images.device)


def _name(prompt: str) -> str:
    return str(prompt).removeprefix("noto ").removeprefix("twemoji ")
