"""Robust rewards against independent computations with numpy."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.image_generation import score_samples
from lightning_draft.methods.draft import DraftModule
from lightning_draft.rewards import (
    Augmented,
    Brightness,
    CLIPScore,
    Ensemble,
    JPEGSize,
    Prompt,
    Relative,
    Reward,
    Sharpness,
)
from lightning_draft.rewards.combine import WeightedReward, ZScoreSum
from lightning_draft.rewards.robust import Augmentation
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import DDIM
from lightning_draft.scoring import score_folder
from lightning_draft.testing import LinearModel

PROMPTS = ["a cat", "a dog"]


def reference(image: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Crop, resize and tint one image `(3, H, W)` by interpolation at explicit pixel positions."""
    height, width = image.shape[1:]
    rows = ((np.arange(height) + 0.5) / height - 0.5) * augmentation.scale + 0.5 + augmentation.offset[1]
    columns = ((np.arange(width) + 0.5) / width - 0.5) * augmentation.scale + 0.5 + augmentation.offset[0]
    padded = np.pad(image, [(0, 0), (height, height), (width, width)], mode="symmetric")
    x, y = columns * width - 0.5, rows * height - 0.5
    across = np.stack([[np.interp(x, np.arange(-width, 2 * width), row) for row in plane] for plane in padded])
    planes = across.transpose(0, 2, 1)
    down = np.stack([[np.interp(y, np.arange(-height, 2 * height), line) for line in plane] for plane in planes])
    return down.transpose(0, 2, 1) * np.array(augmentation.gain).reshape(3, 1, 1)


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_augmentations_agree_with_numpy(size: tuple[int, int], make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, *size).double()
    for augmentation in Augmented(Brightness(), 5, crop=0.4, shift=0.2, tint=0.3, noise=0.0, seed=3).augmentations():
        expected = np.stack([reference(image, augmentation) for image in images.numpy()])
        np.testing.assert_allclose(augmentation(images).numpy(), expected, atol=1e-9)


def test_noise_has_the_stated_spread_and_is_the_same_for_all_images() -> None:
    images = torch.zeros(2, 3, 64, 64)
    noise = Augmentation(1.0, (0.0, 0.0), (1.0, 1.0, 1.0), 0.2, seed=1)(images)
    assert torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(0.2, rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_sampled_values_stay_in_their_ranges() -> None:
    sampled = Augmented(Brightness(), 500, crop=0.3, shift=0.1, tint=0.2, seed=0).augmentations()
    scales = np.array([augmentation.scale for augmentation in sampled])
    offsets = np.array([augmentation.offset for augmentation in sampled])
    gains = np.array([augmentation.gain for augmentation in sampled])
    assert 0.7 <= scales.min() < 0.72 < 0.98 < scales.max() <= 1
    assert (np.abs(offsets) <= (1 - scales[:, None]) / 2 + 0.1).all()
    assert 0.8 <= gains.min() < 0.81 < 1.19 < gains.max() <= 1.2


def test_the_score_is_the_mean_over_the_augmented_images(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 12, 12)
    reward = Augmented(Sharpness(), 3, seed=7)
    expected = sum(Sharpness()(augmentation(images), PROMPTS) for augmentation in reward.augmentations()) / 3
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS))


def test_without_a_seed_each_call_uses_new_augmentations(make_images: Callable[..., Tensor]) -> None:
    images, reward = make_images(2, 12, 12), Augmented(Sharpness())
    torch.manual_seed(0)
    first, second = reward(images, PROMPTS), reward(images, PROMPTS)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(reward(images, PROMPTS), first)


class Fixed(Reward):
    """Given scores times the mean pixel."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.new_tensor(self.values) * images.mean((1, 2, 3))


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_ensembles_agree_with_numpy(how: str) -> None:
    scores = np.array([[1.0, 5.0], [2.0, 3.0], [6.0, 1.0]])
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    reward = Ensemble({f"r{i}": Fixed(*row) for i, row in enumerate(scores)}, how, 0.5)
    expected = {"mean": scores.mean(0), "min": scores.min(0), "mean_minus_std": scores.mean(0) - 0.5 * scores.std(0)}
    total, components = reward.breakdown(images, PROMPTS)
    np.testing.assert_allclose(total.detach().numpy(), expected[how], rtol=1e-5)
    assert {name: score.tolist() for name, score in components.items()} == {
        f"r{i}": row.tolist() for i, row in enumerate(scores)
    }
    (gradient,) = torch.autograd.grad(total.sum(), images)
    # The mean pixel is 1, so that the gradient summed over an image is its score: all scores are linear in it.
    np.testing.assert_allclose(gradient.sum((1, 2, 3)).numpy(), expected[how], rtol=1e-4)


def test_ensemble_of_equal_scores_has_a_finite_gradient(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(Ensemble({"a": Brightness(), "b": Brightness()})(images, PROMPTS).sum(), images)
    (alone,) = torch.autograd.grad(Brightness()(images, PROMPTS).sum(), images)
    torch.testing.assert_close(gradient, alone)


def test_an_ensemble_with_a_black_box_has_no_gradient() -> None:
    assert not Ensemble({"a": Brightness(), "b": JPEGSize()}).differentiable
    assert not Augmented(JPEGSize()).differentiable


def test_relative_equals_the_difference_of_two_prompts(tiny_clip: object, make_images: Callable[..., Tensor]) -> None:
    images, clip = make_images(2, 16, 16), CLIPScore(str(tiny_clip))
    reward = Relative(clip, "red", "dog", k=0.5)
    expected = 1.5 * clip(images, ["red a cat", "red a dog"]) - clip(images, ["dog a cat", "dog a dog"])
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    empty = Relative(clip, "", "dog")
    expected = clip(images, PROMPTS) - clip(images, ["dog a cat", "dog a dog"])
    torch.testing.assert_close(empty(images, PROMPTS), expected)


def test_relative_keeps_the_metadata() -> None:
    class Count(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.tensor([prompt.metadata["count"] * len(prompt) for prompt in prompts])

    prompts = [Prompt("cats", {"count": 2})]
    assert Relative(Count(), "good", "bad")(torch.ones(1, 3, 4, 4), prompts).tolist() == [2 * 9 - 2 * 8]


def test_statistics_of_a_wrapped_sum_are_updated(make_images: Callable[..., Tensor]) -> None:
    images = make_images(4, 8, 8)
    inner = ZScoreSum({"dark": WeightedReward(Brightness(0.0))})
    reward = Augmented(inner, seed=0)
    assert reward.needs_calibration
    reward.update_statistics(inner.breakdown(images, ["a"] * 4)[1])
    assert not reward.needs_calibration


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Augmented(Brightness(), samples=0), "samples=0 must be at least 1"),
        (lambda: Augmented(Brightness(), crop=1.0), "crop=1.0 must be between 0.0 and 0.9"),
        (lambda: Augmented(Brightness(), tint=float("nan")), "tint=nan must be between"),
        (lambda: Augmented(Brightness(), 4, 0.0, 0.0, 0.0, 0.0), "nothing is augmented; write crop=0.1"),
        (lambda: Ensemble({"a": Brightness()}), "Ensemble has 1 rewards; name at least two"),
        (lambda: Ensemble({"a": Brightness(), "b": Brightness()}, "max"), "how='max' is not a valid choice"),
        (lambda: Relative(Brightness(), "good", " good"), "write two different texts"),
        (lambda: Relative(Brightness(), "good", "bad", k=-1.0), "k=-1.0 must be at least 0"),
    ],
)
def test_invalid_arguments_are_rejected(build: Callable[[], Reward], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_scores_outside_training_use_the_same_random_numbers(tmp_path: Path) -> None:
    """At each call, for each batch size, and without a change of the random state."""
    levels = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    for number, image in enumerate(levels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"a_cat_{number}.png")
    images, prompts = levels / 255, ["a cat"] * 3
    rewards = {"reward": Augmented(Brightness(), samples=2), "other": Augmented(Brightness(), samples=3)}
    module = DraftModule(LinearModel(0.1), rewards["reward"], DDIM(3), eval_rewards={"other": rewards["other"]})
    before = torch.get_rng_state()
    expected = module.score(images, prompts)
    single = module.score(images[1:2], prompts[:1])
    batched = score_samples(module.score, Samples(None, images), prompts, torch.device("cpu"), 2)
    files = [score_folder(tmp_path, rewards, batch_size=size, prompts="names") for size in (1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    for name in rewards:
        torch.testing.assert_close(single[name], expected[name][1:2])
        torch.testing.assert_close(batched[name], expected[name])
        for rows in files:
            torch.testing.assert_close(torch.tensor([row.scores[name] for row in rows]), expected[name])
    assert not torch.equal(rewards["reward"](images, prompts), rewards["reward"](images, prompts))
