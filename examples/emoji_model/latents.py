"""Latents of every scene, clean and degraded: what the denoiser is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import CLIPTokenizer

from examples.emoji_model.compositions import Scene, render
from examples.emoji_model.data import Emoji
from examples.emoji_model.degradations import degrade_all
from examples.emoji_model.mixture import WEIGHTS, scenes

COPIES = {"single": 16, "two": 6, "ground": 4, "pair": 4}
"""Degraded copies of each scene, by kind; bare names share those of the single emoji."""


@dataclass(frozen=True)
class Bank:
    """Latents of the scenes of one kind.

    Attributes:
        captions: One a scene.
        clean: float16 `(N, 4, 16, 16)`.
        degraded: float16 `(K, N, 4, 16, 16)`.
    """

    captions: list[str]
    clean: Tensor
    degraded: Tensor


@torch.no_grad()
def build(emoji: Emoji, vae: AutoencoderKL, path: Path) -> dict[str, Bank]:
    """Encode every scene and its degraded copies, or read them from `path` if that exists."""
    if path.exists():
        return {kind: Bank(**bank) for kind, bank in torch.load(path, weights_only=True).items()}
    torch.manual_seed(0)
    banks = {kind: _bank(some, emoji, vae, COPIES[kind]) for kind, some in scenes(emoji).items() if kind != "bare"}
    names = [Scene("", Scene.parse(caption).names).caption for caption in banks["single"].captions]
    banks["bare"] = Bank(names, banks["single"].clean, banks["single"].degraded)
    torch.save({kind: vars(bank) for kind, bank in banks.items()}, path)
    return banks


def encode(images: Tensor, vae: AutoencoderKL) -> Tensor:
    """Return the scaled posterior means `(N, 4, 16, 16)` of images `(N, 3, 64, 64)` in [0, 1], as diffusers does."""
    means = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in images.split(32)])
    scaled: Tensor = vae.config.scaling_factor * means
    return scaled


def _bank(some: list[Scene], emoji: Emoji, vae: AutoencoderKL, copies: int) -> Bank:
    images = torch.stack([render(scene, emoji) for scene in some])
    degraded = [encode(degrade_all(images), vae).half() for _ in range(copies)]
    return Bank([scene.caption for scene in some], encode(images, vae).half(), torch.stack(degraded))


class Latents(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of latents and token ids: kinds by `WEIGHTS`, degraded with probability `degraded`.

    One caption in ten is empty, for classifier-free guidance.
    """

    def __init__(self, banks: dict[str, Bank], words: CLIPTokenizer, batch_size: int, degraded: float) -> None:
        self.banks, self.batch_size, self.degraded = banks, batch_size, degraded
        self.tokens = {kind: _tokenize(words, bank.captions) for kind, bank in banks.items()}
        self.empty = _tokenize(words, [""])[0]
        self.kinds = list(WEIGHTS)
        self.weights = torch.tensor(list(WEIGHTS.values()))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield latents float32 `(B, 4, 16, 16)` and token ids `(B, 16)`."""
        while True:
            items = [self._item() for _ in range(self.batch_size)]
            yield torch.stack([latents for latents, _ in items]).float(), torch.stack([ids for _, ids in items])

    def _item(self) -> tuple[Tensor, Tensor]:
        kind = self.kinds[int(torch.multinomial(self.weights, 1))]
        bank = self.banks[kind]
        row = int(torch.randint(len(bank.captions), ()))
        copy = int(torch.randint(len(bank.degraded), ()))
        latents = bank.degraded[copy, row] if torch.rand(()) < self.degraded else bank.clean[row]
        return latents, self.empty if torch.rand(()) < 0.1 else self.tokens[kind][row]


def _tokenize(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    ids: Tensor = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids
