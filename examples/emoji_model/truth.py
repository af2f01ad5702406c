"""Black-box rewards that recognize the content of an image by comparison with clean images, without a network.

They have no gradient and use no network, so that training cannot exploit them with adversarial images.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.emoji_model.compositions import Scene, render
from examples.emoji_model.data import Emoji
from examples.emoji_model.mixture import COMPOSED, STYLES, new_pairs, scenes
from lightning_draft.rewards import Reward


class ReferencePSNR(Reward):
    """PSNR to the clean image that the caption names, `-10 log10 mean (x - y)^2` in dB; of the closer of two styles.

    Args:
        file: What `examples.emoji_model.data` prepared, for 64x64 images.
    """

    differentiable = False

    def __init__(self, file: str) -> None:
        super().__init__()
        self.emoji = Emoji.load(Path(file))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, 64, 64)`, clamped to [0, 1], and `B` captions to `(B,)`."""
        return torch.stack([self._score(x, str(p)) for x, p in zip(images.float().clamp(0, 1), prompts, strict=True)])

    def _score(self, image: Tensor, caption: str) -> Tensor:
        scene = Scene.parse(caption)
        own = torch.stack([render(scene, self.emoji, style) for style in ((scene.style,) if scene.style else STYLES)])
        return -10 * (own.to(image.device) - image).square().mean((1, 2, 3)).amin().log10()


class SceneRecognized(Reward):
    """1 if the nearest of all scenes has the names and the background of the caption, in either style, else 0.

    The similarity is the correlation of the pixels, `<x - mean x, y - mean y> / (|x - mean x| |y - mean y|)`, which
    does not depend on contrast and brightness. A single emoji is compared with all single emoji of the training set; a
    composition with all compositions and the single emoji in them.

    Args:
        file: What `examples.emoji_model.data` prepared, for 64x64 images.
    """

    differentiable = False

    def __init__(self, file: str) -> None:
        super().__init__()
        emoji = Emoji.load(Path(file))
        known = scenes(emoji)
        parts = [scene for scene in known["single"] if scene.names[0] in COMPOSED]
        self.candidates = {
            "single": known["single"],
            "composed": [*known["two"], *known["ground"], *known["pair"], *new_pairs(), *parts],
        }
        for group, some in self.candidates.items():
            images = torch.stack([render(scene, emoji) for scene in some])
            self.register_buffer(group, _standardize(images), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, 64, 64)`, clamped to [0, 1], and `B` captions to `(B,)`."""
        flat = _standardize(images.float().clamp(0, 1))
        scores = [self._score(x, Scene.parse(str(p))) for x, p in zip(flat, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Tensor, scene: Scene) -> bool:
        group = "single" if scene.kind in ("single", "bare") else "composed"
        nearest = self.candidates[group][int((getattr(self, group) @ image).argmax())]
        return (nearest.names, nearest.color) == (scene.names, scene.color)


def _standardize(images: Tensor) -> Tensor:
    """Subtract each image's mean over all values and scale to length 1: `(N, 3, H, W)` to `(N, 3 H W)`."""
    flat = images.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
