"""`WeightedSum`: values, breakdown, gradients, and how it is configured."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import (
    Brightness,
    ColourBalance,
    JPEGSize,
    Reward,
    Sharpness,
    WeightedReward,
    WeightedSum,
)

PROMPTS = ["a cat", "a dog"]


class PromptLength(Reward):
    """The number of the prompt's letters; counts its calls."""

    differentiable = False
    calls = 0

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_the_sum_and_its_breakdown(pictures: Callable[..., Tensor]) -> None:
    images = pictures(2, 8, 8)
    bright, sharp = Brightness(0.2), Sharpness()
    reward = WeightedSum({"bright": WeightedReward(bright, 2.0), "sharp": WeightedReward(sharp, -0.5)})
    expected = 2 * bright(images, PROMPTS) - 0.5 * sharp(images, PROMPTS)
    total, parts = reward.breakdown(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    torch.testing.assert_close(total, expected)
    assert list(parts) == ["bright", "sharp"]
    assert torch.equal(parts["bright"], bright(images, PROMPTS))
    assert torch.equal(parts["sharp"], sharp(images, PROMPTS))


def test_the_gradient_is_the_weighted_sum_of_gradients(pictures: Callable[..., Tensor]) -> None:
    images = pictures(2, 8, 8).double().requires_grad_()
    bright, red = Brightness(0.2), ColourBalance()
    reward = WeightedSum({"bright": WeightedReward(bright, 2.0), "red": WeightedReward(red, -3.0)})
    parts = [torch.autograd.grad(part(images, PROMPTS).sum(), images)[0] for part in (bright, red)]
    for score in (reward(images, PROMPTS), reward.breakdown(images, PROMPTS)[0]):
        (gradient,) = torch.autograd.grad(score.sum(), images)
        torch.testing.assert_close(gradient, 2 * parts[0] - 3 * parts[1])


def test_a_part_of_weight_zero_is_only_logged(pictures: Callable[..., Tensor]) -> None:
    images = pictures(2, 8, 8).requires_grad_()
    length = PromptLength()
    reward = WeightedSum({"bright": WeightedReward(Brightness()), "length": WeightedReward(length, 0.0)})
    assert reward.differentiable
    assert torch.equal(reward(images, PROMPTS), Brightness()(images, PROMPTS))
    assert length.calls == 0
    total, parts = reward.breakdown(images, PROMPTS)
    assert parts["length"].tolist() == [5.0, 5.0]
    assert torch.equal(total, Brightness()(images, PROMPTS))
    sharp = WeightedSum({"bright": WeightedReward(Brightness()), "sharp": WeightedReward(Sharpness(), 0.0)})
    assert not sharp.breakdown(images, PROMPTS)[1]["sharp"].requires_grad


def test_a_black_box_with_a_weight_takes_the_gradient_away() -> None:
    parts = {"bright": WeightedReward(Brightness()), "size": WeightedReward(JPEGSize(), 0.1)}
    assert not WeightedSum(parts).differentiable


def test_sums_nest(pictures: Callable[..., Tensor]) -> None:
    images = pictures(2, 8, 8)
    inner = WeightedSum({"bright": WeightedReward(Brightness(), 2.0), "sharp": WeightedReward(Sharpness(), 3.0)})
    outer = WeightedSum({"looks": WeightedReward(inner, 0.5), "red": WeightedReward(ColourBalance())})
    bright, sharp, red = (part(images, PROMPTS) for part in (Brightness(), Sharpness(), ColourBalance()))
    total, parts = outer.breakdown(images, PROMPTS)
    assert list(parts) == ["looks", "looks/bright", "looks/sharp", "red"]
    torch.testing.assert_close(total, bright + 1.5 * sharp + red)
    torch.testing.assert_close(outer(images, PROMPTS), total)
    torch.testing.assert_close(parts["looks"], 2 * bright + 3 * sharp)
    assert torch.equal(parts["looks/sharp"], sharp)


def test_a_reward_of_another_shape_is_named(pictures: Callable[..., Tensor]) -> None:
    class PixelBrightness(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean(1)

    reward = WeightedSum({"bright": WeightedReward(PixelBrightness())})
    for score in (reward, reward.breakdown):
        with pytest.raises(ValueError, match=r"'bright': PixelBrightness.* shape \(2, 8, 8\) for 2 .* shape \(2,\)"):
            score(pictures(2, 8, 8), PROMPTS)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "two words"])
def test_names_can_be_part_of_a_log_key(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a reward: .* use letters, digits, _ and -"):
        WeightedSum({name: WeightedReward(Brightness())})


@pytest.mark.parametrize("name", ["type", "training", "values", "forward", "hps-v2_1"])
def test_names_of_methods_are_names_like_others(name: str, pictures: Callable[..., Tensor]) -> None:
    reward = WeightedSum({name: WeightedReward(Brightness())})
    assert list(reward.breakdown(pictures(2, 8, 8), PROMPTS)[1]) == [name]


@pytest.mark.parametrize("parts", [{}, {"bright": WeightedReward(Brightness(), 0.0)}])
def test_a_sum_of_nothing_is_refused(parts: dict[str, WeightedReward]) -> None:
    with pytest.raises(ConfigurationError, match="has no reward whose weight is not 0"):
        WeightedSum(parts)


def test_parts_are_modules_of_the_sum() -> None:
    class Scaled(Reward):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.scale * images.mean((1, 2, 3))

    reward = WeightedSum({"scaled": WeightedReward(Scaled())}).double().eval().requires_grad_(False)
    (parameter,) = reward.parameters()
    assert parameter.dtype == torch.float64
    assert not parameter.requires_grad
    assert not any(module.training for module in reward.modules())


def test_it_is_written_in_yaml_and_overridden_on_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Reward, "reward")
    bright: dict[str, Any] = {"reward": {"class_path": "Brightness", "init_args": {"target": 0.7}}, "weight": 2.0}
    sharp: dict[str, Any] = {"reward": {"class_path": "Sharpness"}}
    config = {"class_path": "WeightedSum", "init_args": {"rewards": {"bright": bright, "sharp": sharp}}}
    parsed = parser.parse_object({"reward": config})
    reward = parser.instantiate_classes(parser.parse_string(parser.dump(parsed))).reward
    assert isinstance(reward, WeightedSum)
    assert reward.weights == {"bright": 2.0, "sharp": 1.0}
    assert reward.parts[0].target == 0.7
