"""Images, prompts and scores that a reward is given or returns, and mistakes in combinations of rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.rewards import (
    Augmented,
    Brightness,
    GradientNormSum,
    LatentNetwork,
    Reward,
    WeightedReward,
    WeightedSum,
)
from tests.bad_input.cases import Case, python

INPUT = "Images and prompts that a reward is called with"
SCORES = "Scores that a reward returns"

IMAGES = torch.full((2, 3, 4, 5), 0.25)
BATCH = ["a cat", "a dog"]


class _Returns(Reward):
    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores: Tensor = self.scores
        return scores


def _latent() -> LatentNetwork:
    return LatentNetwork(torch.nn.Flatten())


def _call(shown: str, images: Any, prompts: Any, *says: str) -> Case:
    return python(INPUT, shown, lambda _: Brightness()(images, prompts), *says)


def _returned(shown: str, scores: Any, *says: str) -> Case:
    return python(SCORES, shown, lambda _: _Returns(scores)(IMAGES, BATCH), "_Returns", *says)


def _rewards(shown: str, rewards: Callable[[], Any], *says: str) -> Case:
    return python("Combined rewards", shown, lambda _: WeightedSum(rewards()), *says)


CASES: list[Case] = [
    _call("uint8", (IMAGES * 255).byte(), BATCH, "images are uint8", "write images.float() / 255"),
    _call("int64", IMAGES.long(), BATCH, "images are int64", "write images.float() / 255"),
    _call("bool", IMAGES > 0, BATCH, "images are bool"),
    _call("floats up to 255", IMAGES * 255, BATCH, "images have values up to 63.75", "write images / 255"),
    _call("(B, H, W, 3)", IMAGES.permute(0, 2, 3, 1), BATCH, "(2, 4, 5, 3)", "write images.permute(0, 3, 1, 2)"),
    _call(
        "float array (B, H, W, 3)",
        IMAGES.permute(0, 2, 3, 1).numpy(),
        BATCH,
        "a numpy array of shape (2, 4, 5, 3)",
        "torch.from_numpy(images).permute(0, 3, 1, 2).float()",
    ),
    _call(
        "uint8 array (B, H, W, 3)",
        np.zeros((2, 4, 5, 3), np.uint8),
        BATCH,
        "write torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255",
    ),
    _call("(3, H, W)", IMAGES[0], BATCH[:1], "shape (3, 4, 5)", "write images.unsqueeze(0)"),
    _call("(H, W, 3)", IMAGES[0].permute(1, 2, 0), BATCH[:1], "images.permute(2, 0, 1).unsqueeze(0)"),
    _call("gray", IMAGES[:, :1], BATCH, "(2, 1, 4, 5)", "write images.expand(-1, 3, -1, -1)"),
    _call("latents", torch.zeros(2, 4, 8, 8), BATCH, "(2, 4, 8, 8)", "latents that are not decoded"),
    _call("two channels", torch.zeros(2, 2, 8, 8), BATCH, "(2, 2, 8, 8)", "give three color channels"),
    _call("five dimensions", torch.zeros(1, 2, 3, 8, 8), BATCH, "(1, 2, 3, 8, 8)", "(B, 3, H, W)"),
    _call("no pixels", torch.zeros(0, 3, 8, 8), [], "(0, 3, 8, 8)", "contains no pixels"),
    _call("a list of tensors", list(IMAGES), BATCH, "a list of Tensor", "torch.stack(images)"),
    _call("a list of arrays", list(IMAGES.numpy()), BATCH, "a list of ndarray"),
    _call("[]", [], [], "images are an empty list"),
    _call("None", None, BATCH, "images are of type NoneType", "a list of PIL images"),
    _call("a path", "cat.png", ["a cat"], "images are of type str"),
    _call("complex", IMAGES.to(torch.complex64), BATCH, "images are complex64"),
    _call("one PIL image", Image.new("RGB", (4, 4)), ["a cat"], "one PIL image", "write [image]"),
    _call(
        "PIL images of two sizes",
        [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))],
        BATCH,
        "different sizes, such as (4, 4) and (5, 4)",
        "resize them",
    ),
    _call("prompts 'ab'", IMAGES, "ab", "prompts='ab' is one string", "write a list of strings"),
    _call("too few prompts", IMAGES, ["a cat"], "2 images and 1 prompts", "prompts=['a cat'] * 2"),
    _call("too many prompts", IMAGES, ["a", "b", "c"], "2 images and 3 prompts"),
    _call("prompts ['a cat', 3]", IMAGES, ["a cat", 3], "one element is 3 (int)", "pass the text"),
    _call("prompts [b'a cat', b'a dog']", IMAGES, [b"a cat", b"a dog"], "one element is b'a cat'"),
    _call("prompts ['a cat', None]", IMAGES, ["a cat", None], "one element is None"),
    _call("prompts []", IMAGES, [], "must be a non-empty list of strings", "['a cat']"),
    _call("prompts None", IMAGES, None, "must be a non-empty list of strings, got NoneType"),
    _call(
        "prompts as a dictionary", IMAGES, {"prompt": 1, "count": 2}, "must be a non-empty list of strings, got dict"
    ),
    _call("prompts as a tensor", IMAGES, torch.zeros(2), "must be a non-empty list of strings, got Tensor"),
    _returned("a list", [1.0, 2.0], "returned a list for 2 images", "torch.stack"),
    _returned("None", None, "returned a NoneType", "return a tensor of shape (2,)"),
    _returned("a number", 0.5, "returned a float", "return a tensor of shape (2,)"),
    _returned("an array", np.zeros(2), "returned a ndarray", "return a tensor of shape (2,)"),
    _returned("a tuple", (torch.zeros(2), {}), "returned a tuple", "return a tensor of shape (2,)"),
    _returned("a dictionary", {"score": torch.zeros(2)}, "returned a dict"),
    _returned("(2, 1)", torch.zeros(2, 1), "returned shape (2, 1) for 2 images", "shape (2,)"),
    _returned("(1, 2)", torch.zeros(1, 2), "returned shape (1, 2) for 2 images", "shape (2,)"),
    _returned("()", torch.zeros(()), "returned shape () for 2 images", "shape (2,)"),
    _returned("(3,)", torch.zeros(3), "returned shape (3,) for 2 images", "shape (2,)"),
    _returned("(0,)", torch.zeros(0), "returned shape (0,) for 2 images", "shape (2,)"),
    _returned("complex", torch.zeros(2, dtype=torch.complex64), "returned complex scores", "scores.real"),
    _returned("NaN", torch.tensor([0.0, float("nan")]), "not finite (nan) for the prompt 'a dog'", "look for a log"),
    _returned("+Inf", torch.tensor([float("inf"), 0.0]), "not finite (inf) for the prompt 'a cat'", "look for a log"),
    _returned("-Inf", torch.tensor([float("-inf"), 0.0]), "not finite (-inf) for the prompt 'a cat'"),
    _returned("on the meta device", torch.zeros(2, device="meta"), "meta"),
    _rewards("{}", lambda: {}, "rewards"),
    _rewards("all weights 0", lambda: {"a": WeightedReward(Brightness(), weight=0.0)}, "a weight other than 0"),
    _rewards("a weight of NaN", lambda: {"a": WeightedReward(Brightness(), weight=float("nan"))}, "nan"),
    _rewards("a weight of infinity", lambda: {"a": WeightedReward(Brightness(), weight=float("inf"))}, "inf"),
    _rewards(
        "a name with a space",
        lambda: {"a b": WeightedReward(Brightness())},
        "'a b' cannot be the name of a reward",
        "use letters, digits, _ and -",
    ),
    _rewards(
        "a name with a slash", lambda: {"a/b": WeightedReward(Brightness())}, "'a/b' cannot be the name of a reward"
    ),
    _rewards("an empty name", lambda: {"": WeightedReward(Brightness())}, "'' cannot be the name of a reward"),
    _rewards("a reward without a weight", lambda: {"a": Brightness()}, "a", "WeightedReward"),
    _rewards("a list", lambda: [WeightedReward(Brightness())], "WeightedReward"),
    python(INPUT, "images, of a reward of latents", lambda _: _latent()(IMAGES, BATCH), "scores the latents", "choose"),
    python(
        "Combined rewards",
        "Augmented with a reward of latents",
        lambda _: Augmented(_latent()),
        "reward=LatentNetwork scores latents",
        "such as CLIPScore",
    ),
    python(
        "Combined rewards",
        "GradientNormSum with rewards of images and of latents",
        lambda _: GradientNormSum({"a": WeightedReward(_latent()), "b": WeightedReward(Brightness())}),
        "some of its rewards score images and others latents",
        "write WeightedSum or ZScoreSum",
    ),
]
