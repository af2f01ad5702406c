"""Recognize a generated emoji by the nearest training image."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.emoji_model.data import Emoji
from lightning_draft.rewards import Reward


class NearestImage(Reward):
    """1 if the nearest image (L2 distance of pixels) shows the object in the prompt, else 0. Black box.

    Pixels are compared with those of the training images, without a network that training could exploit.

    Args:
        file: File written by `examples.emoji_model.data`.
    """

    differentiable = False

    def __init__(self, file: str) -> None:
        super().__init__()
        emoji = Emoji.load(Path(file))
        rows = torch.nonzero(emoji.drawn & ~emoji.held_out).squeeze(1)
        self.names = [emoji.names[row] for row in rows.tolist()]
        self.register_buffer("images", emoji.images[rows], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` of the training size and `B` prompts, names with or without a style, to `(B,)`."""
        nearest = torch.cdist(images.float().flatten(1), self.images.flatten(1)).argmin(1).tolist()
        right = [_name(prompt) == self.names[row] for prompt, row in zip(prompts, nearest, strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=images.device)


def _name(prompt: str) -> str:
    return str(prompt).removeprefix("noto ").removeprefix("twemoji ")
