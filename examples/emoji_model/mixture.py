"""The training data of the 64x64 model: scenes by kind, each clean or degraded.

Large base models are trained on images of different quality, and a reward shifts them to the better ones. Here three
quarters of the training images are degraded, and the captions do not mention it.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import CLIPTokenizer

from examples.emoji_model.compositions import COLORS, Scene, render
from examples.emoji_model.data import Emoji
from examples.emoji_model.degradations import degrade

DEGRADED = 0.75
"""Probability that a training image of the denoiser is degraded."""
SUBJECTS = 160
WEIGHTS = {"single": 0.60, "bare": 0.08, "two": 0.08, "ground": 0.12, "pair": 0.12}
"""Probability of each kind of scene."""
COMPOSED = (
    *("ambulance", "banana", "bell", "butterfly", "cactus", "cherries", "crab", "fire", "ghost", "key", "lemon"),
    *("octopus", "mushroom", "bomb", "doughnut", "hamburger", "pig", "rocket", "strawberry", "tulip"),
)
"""Names of the scenes with two things or a colored ground; pairs use the first twelve."""
PAIRED = COMPOSED[:12]
STYLES = ("noto", "twemoji")


def subjects(emoji: Emoji) -> list[str]:
    """Return the names that the model learns: `COMPOSED`, and a fixed random choice of the other one-word names."""
    names = {name for name, drawn in zip(emoji.names, emoji.drawn.tolist(), strict=True) if drawn}
    others = sorted(name for name in names if " " not in name and name not in COMPOSED)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
    return sorted([*COMPOSED, *(others[i] for i in order[: SUBJECTS - len(COMPOSED)])])


def scenes(emoji: Emoji) -> dict[str, list[Scene]]:
    """Return every scene that the model learns, by kind."""
    names = subjects(emoji)
    return {
        "single": [Scene(style, (name,)) for name in names for style in STYLES],
        "bare": [Scene("", (name,)) for name in names],
        "two": [Scene(style, (name, name)) for name in COMPOSED for style in STYLES],
        "ground": [Scene(style, (name,), color) for name in COMPOSED for color in COLORS for style in STYLES],
        "pair": [Scene(style, (a, b)) for a in PAIRED for b in PAIRED if a != b for style in STYLES],
    }


def new_pairs() -> list[Scene]:
    """Return the pairs of names in `COMPOSED` that the model does not learn, although it learns both names."""
    both = [(a, b) for a in COMPOSED for b in COMPOSED if a != b and not {a, b} <= set(PAIRED)]
    return [Scene(style, pair) for pair in both for style in STYLES]


def captions(emoji: Emoji) -> list[str]:
    """Return the caption of every scene."""
    return [scene.caption for some in scenes(emoji).values() for scene in some]


def split(some: list[Scene]) -> tuple[list[str], list[str]]:
    """Return the captions for fine-tuning and for evaluation: every fourth name is for evaluation, in both styles."""
    shown = sorted({replace(scene, style="").caption for scene in some})
    evaluated = set(shown[1::4])
    parts: tuple[list[str], list[str]] = ([], [])
    for scene in some:
        parts[replace(scene, style="").caption in evaluated].append(scene.caption)
    return sorted(parts[0]), sorted(parts[1])


class RenderedImages(IterableDataset[Tensor]):
    """Endless batches for the autoencoder: two thirds scenes, one third any emoji; half are degraded."""

    def __init__(self, emoji: Emoji, batch_size: int) -> None:
        self.emoji, self.batch_size = emoji, batch_size
        self.scenes = scenes(emoji)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield float32 `(batch_size, 3, S, S)` in [0, 1]."""
        while True:
            yield torch.stack([self._render() for _ in range(self.batch_size)])

    def _render(self) -> Tensor:
        if torch.rand(()) < 0.33:
            image = self.emoji.images[int(torch.randint(len(self.emoji.images), ()))]
        else:
            kind = list(WEIGHTS)[int(torch.multinomial(torch.tensor(list(WEIGHTS.values())), 1))]
            scene = self.scenes[kind][int(torch.randint(len(self.scenes[kind]), ()))]
            image = render(scene, self.emoji, STYLES[int(torch.randint(2, ()))])
        return degrade(image) if torch.rand(()) < 0.5 else image


class Captioned(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of clean images and token ids for the CLIP: half compositions, half single emoji.

    Most scenes come with a similar one (`similar`), which the loss must tell apart. No two captions of a batch fit the
    same image: a caption is written without its style only if no other of the batch has the same words.
    """

    def __init__(self, emoji: Emoji, words: CLIPTokenizer, batch_size: int) -> None:
        self.emoji, self.words, self.batch_size = emoji, words, batch_size
        known = scenes(emoji)
        self.composed = [scene for kind in ("two", "ground", "pair") for scene in known[kind]]
        self.singles = known["single"]
        self.others = [Scene(style, (name,)) for style, name in zip(emoji.styles, emoji.names, strict=True)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 `(B, 3, S, S)` in [0, 1] and int64 `(B, 16)`."""
        while True:
            counts = (self.batch_size // 2, self.batch_size // 4, self.batch_size // 4)
            some: dict[str, Scene] = {}
            for known, count in zip((self.composed, self.singles, self.others), counts, strict=True):
                some |= {scene.caption: scene for scene in with_similar(known, count)}
            chosen = without_needless_styles(list(some.values()))
            styles = [STYLES[int(torch.randint(2, ()))] for _ in chosen]
            images = torch.stack([render(s, self.emoji, style) for s, style in zip(chosen, styles, strict=True)])
            texts = [scene.caption for scene in chosen]
            ids = self.words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            yield images, ids


def similar(scene: Scene) -> Scene:
    """Return `scene` with one change: of the style, the color of the background, or the order of a pair."""
    if scene.kind == "pair" and torch.rand(()) < 0.5:
        return replace(scene, names=scene.names[::-1])
    if scene.kind == "ground" and torch.rand(()) < 0.5:
        others = [color for color in COLORS if color != scene.color]
        return replace(scene, color=others[int(torch.randint(len(others), ()))])
    return replace(scene, style=STYLES[1 - STYLES.index(scene.style)])


def with_similar(known: list[Scene], count: int) -> list[Scene]:
    """Choose `count` different scenes at random, two thirds of which are a scene and a similar one."""
    chosen: dict[str, Scene] = {}
    for i in torch.randperm(len(known)).tolist():
        chosen[known[i].caption] = known[i]
        if torch.rand(()) < 0.5:
            other = similar(known[i])
            chosen[other.caption] = other
        if len(chosen) >= count:
            break
    return list(chosen.values())[:count]


def without_needless_styles(some: list[Scene]) -> list[Scene]:
    """Drop the style of two fifths of the scenes of which `some` has one style only."""
    bare = [replace(scene, style="") for scene in some]
    return [
        plain if bare.count(plain) == 1 and torch.rand(()) < 0.4 else scene
        for scene, plain in zip(some, bare, strict=True)
    ]
