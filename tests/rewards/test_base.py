"""The interface of rewards: prompts with metadata, and the checks of images, prompts and scores at every call."""

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import (
    Brightness,
    JPEGSize,
    NonFiniteScoreError,
    Prompt,
    Reward,
    WeightedReward,
    WeightedSum,
    check_scores,
)


def test_a_prompt_equals_its_text() -> None:
    prompt = Prompt("a red cat", {"count": 2})
    assert prompt == "a red cat"
    assert {prompt: 1}["a red cat"] == 1
    assert prompt.metadata == {"count": 2}
    assert Prompt("a cat").metadata == {}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_copies_of_a_prompt_keep_its_metadata(duplicate) -> None:
    prompt = duplicate(Prompt("a cat", {"count": 2}))
    assert type(prompt) is Prompt
    assert prompt == "a cat"
    assert prompt.metadata == {"count": 2}


def test_metadata_is_copied_into_the_prompt() -> None:
    metadata = {"count": 2}
    prompt = Prompt("a cat", metadata)
    metadata["count"] = 3
    assert prompt.metadata == {"count": 2}


class Count(Reward):
    """Read the metadata."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) * torch.tensor([float(prompt.metadata["count"]) for prompt in prompts])


def test_a_reward_needs_only_forward() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    prompts = [Prompt("cats", {"count": 2}), Prompt("dogs", {"count": 4})]
    total, parts = Count().breakdown(images, prompts)
    assert total.tolist() == [1.0, 2.0]
    assert parts == {}
    assert Count.differentiable
    with pytest.raises(TypeError, match="abstract"):
        Reward()  # type: ignore[abstract]


def test_check_scores_rejects_other_shapes_and_keeps_valid_scores() -> None:
    scores = torch.zeros(2)
    assert check_scores(scores, 2, Count()) is scores
    with pytest.raises(ConfigurationError, match=r"Count.forward returned shape \(2,\) for 3 images; .* shape \(3,\)"):
        check_scores(scores, 3, Count())


IMAGES = torch.full((2, 3, 4, 5), 0.25)
BATCH = ["a cat", "a dog"]
WRONG_INPUT = {
    "uint8": ((IMAGES * 255).byte(), BATCH, r"images are uint8; .* write images.float\(\) / 255"),
    "int64": (IMAGES.long(), BATCH, "images are int64"),
    "bool": (IMAGES > 0, BATCH, "images are bool"),
    "bytes as floats": (IMAGES * 255, BATCH, "images have values up to 63.75; .* write images / 255"),
    "HWC tensor": (IMAGES.permute(0, 2, 3, 1), BATCH, r"write images.permute\(0, 3, 1, 2\)"),
    "HWC array": (
        IMAGES.permute(0, 2, 3, 1).numpy(),
        BATCH,
        r"a numpy array of shape \(2, 4, 5, 3\); .* torch.from_numpy\(images\).permute\(0, 3, 1, 2\).float\(\)$",
    ),
    "uint8 array": (
        np.zeros((2, 4, 5, 3), np.uint8),
        BATCH,
        r"write torch.from_numpy\(images\).permute\(0, 3, 1, 2\).float\(\) / 255$",
    ),
    "one image": (IMAGES[0], BATCH[:1], r"shape \(3, 4, 5\); .* write images.unsqueeze\(0\)"),
    "one HWC image": (IMAGES[0].permute(1, 2, 0), BATCH[:1], r"images.permute\(2, 0, 1\).unsqueeze\(0\)"),
    "gray": (IMAGES[:, :1], BATCH, r"write images.expand\(-1, 3, -1, -1\)"),
    "latents": (torch.zeros(2, 4, 8, 8), BATCH, "latents that are not decoded"),
    "two channels": (torch.zeros(2, 2, 8, 8), BATCH, "give three color channels"),
    "no pixels": (torch.zeros(0, 3, 8, 8), [], "contains no pixels"),
    "list of tensors": (list(IMAGES), BATCH, r"a list of Tensor; .* torch.stack\(images\)"),
    "nothing": ([], [], "images are an empty list"),
    "None": (None, BATCH, "images are of type NoneType"),
    "path": ("cat.png", ["a cat"], "images are of type str"),
    "one PIL image": (Image.new("RGB", (4, 4)), ["a cat"], r"one PIL image; .* write \[image\]"),
    "PIL images of two sizes": (
        [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))],
        BATCH,
        r"different sizes, such as \(4, 4\) and \(5, 4\)",
    ),
    "one string": (IMAGES, "ab", "prompts='ab' is one string; write a list of strings"),
    "too few prompts": (IMAGES, ["a cat"], r"2 images and 1 prompts .* prompts=\['a cat'\] \* 2"),
    "too many prompts": (IMAGES, ["a", "b", "c"], "2 images and 3 prompts"),
    "a number": (IMAGES, ["a cat", 3], r"one element is 3 \(int\)"),
    "bytes": (IMAGES, [b"a cat", b"a dog"], "one element is b'a cat'"),
    "None as prompt": (IMAGES, ["a cat", None], r"one element is None"),
    "no prompts": (IMAGES, [], "must be a non-empty list of strings"),
    "dictionary": (IMAGES, {"prompt": 1, "count": 2}, "must be a non-empty list of strings, got dict"),
}


@pytest.mark.parametrize("name", WRONG_INPUT)
def test_wrong_input_is_rejected_and_the_error_gives_the_fix(name: str) -> None:
    images, prompts, message = WRONG_INPUT[name]
    total = WeightedSum({"dark": WeightedReward(Brightness(0.0))})
    for score in (Brightness(), Brightness().breakdown, total, total.breakdown):
        with pytest.raises(ConfigurationError, match=message):
            score(images, prompts)


def test_images_may_lie_slightly_outside_of_the_range() -> None:
    images = torch.linspace(-0.6, 1.7, 96).view(2, 3, 4, 4)
    assert torch.equal(Brightness(0.0)(images, BATCH), -(images.mean((1, 2, 3)) ** 2))
    diverged = 300 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert Brightness(0.0)(diverged, BATCH).isfinite().all()


def test_pil_images_score_as_the_same_pixels_in_a_tensor() -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (2, 6, 7, 3), dtype=np.uint8)
    pil_images = [Image.fromarray(array) for array in bytes_]
    images = torch.from_numpy(bytes_).permute(0, 3, 1, 2).float() / 255
    for reward in (Brightness(), JPEGSize(), WeightedSum({"dark": WeightedReward(Brightness(0.0))})):
        assert torch.equal(reward(pil_images, BATCH), reward(images, BATCH))
        assert torch.equal(reward.breakdown(pil_images, BATCH)[0], reward(images, BATCH))


@pytest.mark.parametrize(("mode", "color"), [("L", 51), ("RGBA", (51, 51, 51, 255)), ("1", 1), ("P", 0)])
def test_pil_images_of_other_modes_become_rgb(mode: str, color: object) -> None:
    image = Image.new(mode, (4, 4), color)
    expected = np.asarray(image.convert("RGB"), dtype=np.float64).mean() / 255
    assert -float(Brightness(0.0)([image], ["a"])) == pytest.approx(expected**2, abs=1e-6)
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert float(Brightness(1.0)([transparent], ["a"])) == pytest.approx(0)


class Returns(Reward):
    """Returns what it is given."""

    def __init__(self, scores: object) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_scores_of_other_types_become_float32(dtype: torch.dtype) -> None:
    for scores in (Returns(torch.tensor([0, 1], dtype=dtype))(IMAGES, BATCH),):
        assert scores.dtype == torch.float32
        assert scores.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"returned a list for 2 images; .* torch.stack"),
        (None, "returned a NoneType"),
        (torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images"),
        (torch.zeros(()), r"returned shape \(\) for 2 images"),
        (torch.zeros(2, dtype=torch.complex64), "returned complex scores"),
    ],
)
def test_scores_of_another_shape_or_type_are_rejected(scores: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Returns(scores)(IMAGES, BATCH)
    with pytest.raises(ConfigurationError, match=f"reward 'odd': Returns.*{message}"):
        WeightedSum({"odd": WeightedReward(Returns(scores))}).breakdown(IMAGES, BATCH)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_their_prompts(value: float) -> None:
    with pytest.raises(NonFiniteScoreError, match=r"not finite .* for the prompt 'a dog'; look for a log"):
        Returns(torch.tensor([0.0, value]))(IMAGES, BATCH)
    images = IMAGES.clone()
    images[0] = value
    with pytest.raises(NonFiniteScoreError, match="for the prompt 'a cat'; the images themselves are not finite"):
        Brightness()(images, BATCH)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_infinite_score_never_has_a_finite_gradient(value: float) -> None:
    class Broken(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3)) + torch.tensor([0.0, value])

    images = IMAGES.clone().requires_grad_()
    with pytest.warns(UserWarning, match="not finite .* for the prompt 'a dog'"):
        scores = Broken()(images, BATCH)
    assert scores[0] == 0.25
    assert scores[1].isnan()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert not gradient[1].isfinite().any()
