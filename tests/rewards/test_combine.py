"""Sums of rewards: values, breakdown, gradients, scales, thresholds, and configuration."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Hinge, SoftHinge
from lightning_draft.rewards import (
    Brightness,
    ColorBalance,
    JPEGSize,
    Reward,
    Sharpness,
    WeightedReward,
    WeightedSum,
)
from lightning_draft.rewards.combine import GradientNormSum, RunningMoments, ZScoreSum
from lightning_draft.testing import ConstantReward

PROMPTS = ["a cat", "a dog"]


class PromptLength(Reward):
    """The number of letters of the prompt; counts its calls."""

    differentiable = False
    calls = 0

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_sum_and_breakdown_equal_the_weighted_components(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8)
    bright, sharp = Brightness(0.2), Sharpness()
    reward = WeightedSum({"bright": WeightedReward(bright, 2.0), "sharp": WeightedReward(sharp, -0.5)})
    expected = 2 * bright(images, PROMPTS) - 0.5 * sharp(images, PROMPTS)
    total, parts = reward.breakdown(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    torch.testing.assert_close(total, expected)
    assert list(parts) == ["bright", "sharp"]
    assert torch.equal(parts["bright"], bright(images, PROMPTS))
    assert torch.equal(parts["sharp"], sharp(images, PROMPTS))


def test_the_gradient_is_the_weighted_sum_of_gradients(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8).double().requires_grad_()
    bright, red = Brightness(0.2), ColorBalance()
    reward = WeightedSum({"bright": WeightedReward(bright, 2.0), "red": WeightedReward(red, -3.0)})
    parts = [torch.autograd.grad(part(images, PROMPTS).sum(), images)[0] for part in (bright, red)]
    for score in (reward(images, PROMPTS), reward.breakdown(images, PROMPTS)[0]):
        (gradient,) = torch.autograd.grad(score.sum(), images)
        torch.testing.assert_close(gradient, 2 * parts[0] - 3 * parts[1])


def test_a_component_of_weight_zero_is_only_logged(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8).requires_grad_()
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


def test_a_sum_with_a_weighted_black_box_is_not_differentiable() -> None:
    parts = {"bright": WeightedReward(Brightness()), "size": WeightedReward(JPEGSize(), 0.1)}
    assert not WeightedSum(parts).differentiable


def test_nested_sums_report_all_components(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8)
    inner = WeightedSum({"bright": WeightedReward(Brightness(), 2.0), "sharp": WeightedReward(Sharpness(), 3.0)})
    outer = WeightedSum({"looks": WeightedReward(inner, 0.5), "red": WeightedReward(ColorBalance())})
    bright, sharp, red = (part(images, PROMPTS) for part in (Brightness(), Sharpness(), ColorBalance()))
    total, parts = outer.breakdown(images, PROMPTS)
    assert list(parts) == ["looks", "looks/bright", "looks/sharp", "red"]
    torch.testing.assert_close(total, bright + 1.5 * sharp + red)
    torch.testing.assert_close(outer(images, PROMPTS), total)
    torch.testing.assert_close(parts["looks"], 2 * bright + 3 * sharp)
    assert torch.equal(parts["looks/sharp"], sharp)


def test_component_that_returns_another_shape_is_named_in_the_error(make_images: Callable[..., Tensor]) -> None:
    class PixelBrightness(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean(1)

    reward = WeightedSum({"bright": WeightedReward(PixelBrightness())})
    for score in (reward, reward.breakdown):
        with pytest.raises(ValueError, match=r"'bright': PixelBrightness.* shape \(2, 8, 8\) for 2 .* shape \(2,\)"):
            score(make_images(2, 8, 8), PROMPTS)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "two words"])
def test_names_that_cannot_be_log_keys_are_rejected(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be the name of a reward.* use letters, digits, _ and -"):
        WeightedSum({name: WeightedReward(Brightness())})


@pytest.mark.parametrize("name", ["type", "training", "values", "forward", "hps-v2_1"])
def test_components_can_have_names_of_module_methods(name: str, make_images: Callable[..., Tensor]) -> None:
    reward = WeightedSum({name: WeightedReward(Brightness())})
    assert list(reward.breakdown(make_images(2, 8, 8), PROMPTS)[1]) == [name]


@pytest.mark.parametrize("parts", [{}, {"bright": WeightedReward(Brightness(), 0.0)}])
def test_sum_without_components_is_rejected(parts: dict[str, WeightedReward]) -> None:
    with pytest.raises(ConfigurationError, match="needs a reward with a weight other than 0"):
        WeightedSum(parts)


def test_components_are_submodules_of_the_sum() -> None:
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


def test_sum_is_read_from_yaml_and_overridden_on_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Reward, "reward")
    bright: dict[str, Any] = {"reward": {"class_path": "Brightness", "init_args": {"target": 0.7}}, "weight": 2.0}
    sharp: dict[str, Any] = {"reward": {"class_path": "Sharpness"}}
    config = {"class_path": "WeightedSum", "init_args": {"rewards": {"bright": bright, "sharp": sharp}}}
    parsed = parser.parse_object({"reward": config})
    reward = parser.instantiate(parser.parse_string(parser.dump(parsed))).reward
    assert isinstance(reward, WeightedSum)
    assert reward.weights == {"bright": 2.0, "sharp": 1.0}
    assert reward.rewards[0].target == 0.7


# One scale for all parts.


def zscore(memory: int = 4096, **options: Any) -> ZScoreSum:
    return ZScoreSum(
        {
            "bright": WeightedReward(Brightness(0.2), 2.0, **options),
            "size": WeightedReward(JPEGSize(), 0.0),
            "sharp": WeightedReward(Sharpness(), -0.5),
        },
        memory,
    )


def test_running_moments_are_exact_up_to_memory_and_decay_after_it() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [3 + 2 * torch.randn(size, generator=generator, dtype=torch.float64) for size in (1, 4, 7, 2)]
    moments = RunningMoments(14)
    assert moments.std == 1
    for batch in batches:
        moments.update(batch)
    every = torch.cat(batches)
    assert moments.mean == pytest.approx(every.mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(every.std(correction=0).item(), rel=1e-12)
    before, new = (moments.mean, moments.variance), torch.tensor([10.0, 12.0])
    moments.update(new)
    mean = (14 * before[0] + 2 * 11) / 16
    square = (14 * (before[1] + before[0] ** 2) + (100 + 144)) / 16
    assert (moments.mean, moments.variance) == pytest.approx((mean, square - mean**2), rel=1e-12)
    for _ in range(200):
        moments.update(new)
    assert (moments.mean, moments.std) == pytest.approx((11, 1), rel=1e-6)


def test_std_is_one_for_numbers_that_differ_only_by_rounding() -> None:
    moments = RunningMoments(100)
    moments.update(torch.full((5,), 0.1) + torch.tensor([0, 1e-9, 0, -1e-9, 0]))
    assert moments.std == 1


def test_z_scores_use_the_running_statistics(make_images: Callable[..., Tensor]) -> None:
    reward = zscore()
    assert reward.needs_calibration
    seen = make_images(20, 8, 8, seed=1)
    reward.update_statistics(reward.breakdown(seen, ["a"] * 20)[1])
    assert not reward.needs_calibration
    images = make_images(2, 8, 8).requires_grad_()
    expected = torch.zeros(2)
    for part, weight in ((Brightness(0.2), 2.0), (Sharpness(), -0.5)):
        known = part(seen, [""] * 20)
        expected = expected + weight * (part(images, PROMPTS) - known.mean()) / known.std(correction=0)
    total, parts = reward.breakdown(images, PROMPTS)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["bright"], Brightness(0.2)(images, PROMPTS))
    ours, theirs = (torch.autograd.grad(score.sum(), images, retain_graph=True)[0] for score in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_scoring_changes_no_statistics(make_images: Callable[..., Tensor]) -> None:
    reward = zscore()
    reward.update_statistics(reward.breakdown(make_images(4, 8, 8), ["a"] * 4)[1])
    before = reward.get_extra_state()
    reward(make_images(2, 8, 8), PROMPTS)
    reward.breakdown(make_images(2, 8, 8), PROMPTS)
    assert reward.get_extra_state() == before


def test_statistics_are_in_the_state_dict_and_reach_nested_sums(make_images: Callable[..., Tensor]) -> None:
    def nested() -> WeightedSum:
        return WeightedSum({"looks": WeightedReward(zscore()), "red": WeightedReward(ColorBalance())})

    reward, other = nested(), nested()
    assert reward.needs_calibration
    reward.update_statistics(reward.breakdown(make_images(9, 8, 8), ["a"] * 9)[1])
    assert not reward.needs_calibration
    other.load_state_dict(reward.state_dict())
    images = make_images(2, 8, 8, seed=3)
    assert torch.equal(reward(images, PROMPTS), other(images, PROMPTS))
    assert not torch.equal(reward(images, PROMPTS), nested()(images, PROMPTS))


def test_a_threshold_is_in_the_units_of_its_component(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8)
    free = zscore()
    free.update_statistics(free.breakdown(images, PROMPTS)[1])
    best = float(Brightness(0.2)(images, PROMPTS).min())
    held = zscore(threshold=best)
    held.load_state_dict(free.state_dict())
    moments = free.moments["bright"]
    sharp = -0.5 * (Sharpness()(images, PROMPTS) - free.moments["sharp"].mean) / free.moments["sharp"].std
    torch.testing.assert_close(held(images, PROMPTS), sharp + 2 * (best - moments.mean) / moments.std)


def test_memory_below_two_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match="memory=1 must be at least 2"):
        zscore(1)


# Saturation.


@pytest.mark.parametrize("weight", [2.0, -2.0])
@pytest.mark.parametrize("width", [0.0, 0.05])
def test_a_component_has_no_gradient_beyond_its_threshold(
    weight: float, width: float, make_images: Callable[..., Tensor]
) -> None:
    """Compared with the hinge and the softplus of `losses`."""
    images = make_images(2, 8, 8).double().requires_grad_()
    score = Sharpness()(images, PROMPTS)
    threshold, sign = float(score.detach().mean()), weight / 2
    reward = WeightedSum({"sharp": WeightedReward(Sharpness(), weight, threshold, width)})
    loss = SoftHinge(sign * threshold, width) if width else Hinge(sign * threshold)
    expected = weight * threshold - 2 * loss(sign * score)
    total = reward(images, PROMPTS)
    torch.testing.assert_close(total, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), images, retain_graph=True)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs)
    missing = sign * (threshold - score.detach())
    if width == 0:
        assert [bool(gradient.any()) for gradient in ours] == (missing > 0).tolist()
        assert sorted((missing > 0).tolist()) == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.1}, "width=0.1 needs a threshold"),
        ({"threshold": 1.0, "width": -0.1}, "width=-0.1 must be at least 0"),
        ({"threshold": float("nan")}, "threshold=nan of Brightness must be finite"),
        ({"weight": float("inf")}, "weight=inf of Brightness must be finite"),
    ],
)
def test_invalid_weights_and_thresholds_are_rejected(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WeightedReward(Brightness(), **options)


# Equal pulls.


def pulling(**threshold: float) -> GradientNormSum:
    return GradientNormSum(
        {
            "bright": WeightedReward(Brightness(0.2), 2.0, **threshold),
            "size": WeightedReward(JPEGSize(), 0.0),
            "red": WeightedReward(ColorBalance(), -0.5),
        }
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_components_have_equal_gradient_norms_in_any_unit(
    dtype: torch.dtype, make_images: Callable[..., Tensor]
) -> None:
    images = make_images(2, 8, 8).to(dtype).requires_grad_()
    parts = {"bright": (Brightness(0.2), 2.0), "red": (ColorBalance(), -0.5)}
    exact = images.detach().double().requires_grad_()
    raw = {name: torch.autograd.grad(part(exact, PROMPTS).sum(), exact)[0] for name, (part, _) in parts.items()}
    norms = {name: gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1) for name, gradient in raw.items()}
    common = sum(norms.values()) / 2
    expected = sum(parts[name][1] * common * raw[name] / norms[name] for name in raw)
    total, scores = pulling().breakdown(images, PROMPTS)
    assert scores["size"].tolist() == JPEGSize()(images, PROMPTS).tolist()
    (gradient,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)
    plain = WeightedSum({name: WeightedReward(part, weight) for name, (part, weight) in parts.items()})
    torch.testing.assert_close(total, plain(images, PROMPTS))
    with torch.no_grad():
        assert torch.equal(pulling()(images, PROMPTS), plain(images, PROMPTS))


def test_scaling_a_component_does_not_change_its_gradient_fraction(make_images: Callable[..., Tensor]) -> None:
    class Hundredfold(ColorBalance):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return 100 * super().forward(images, prompts)

    def direction(red: Reward) -> Tensor:
        images = make_images(2, 8, 8).requires_grad_()
        reward = GradientNormSum({"bright": WeightedReward(Brightness(0.2)), "red": WeightedReward(red)})
        (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
        return torch.nn.functional.normalize(gradient.flatten(1), dim=1)

    torch.testing.assert_close(direction(ColorBalance()), direction(Hundredfold()), rtol=1e-4, atol=1e-6)


def test_a_sum_of_one_component_equals_that_component(make_images: Callable[..., Tensor]) -> None:
    images = make_images(2, 8, 8).requires_grad_()
    scores = [Sharpness()(images, PROMPTS), GradientNormSum({"a": WeightedReward(Sharpness())})(images, PROMPTS)]
    one, other = (torch.autograd.grad(score.sum(), images, retain_graph=True)[0] for score in scores)
    torch.testing.assert_close(one, other)


def test_a_component_with_zero_gradient_does_not_change_the_others(make_images: Callable[..., Tensor]) -> None:
    """One component is constant and one has reached its threshold; the gradient stays finite."""
    images = make_images(2, 8, 8).requires_grad_()
    sharp = float(Sharpness()(images, PROMPTS).detach().min())
    reward = GradientNormSum(
        {
            "constant": WeightedReward(ConstantReward()),
            "sharp": WeightedReward(Sharpness(), threshold=sharp - 1),
            "red": WeightedReward(ColorBalance()),
        }
    )
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    (red,) = torch.autograd.grad(ColorBalance()(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all()
    cosine = torch.cosine_similarity(gradient.flatten(1), red.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2))


@pytest.mark.parametrize("kind", [WeightedSum, ZScoreSum, GradientNormSum])
def test_sum_under_activation_checkpointing_is_unchanged(
    kind: type[WeightedSum], make_images: Callable[..., Tensor]
) -> None:
    parts = {"bright": WeightedReward(Brightness(0.2)), "sharp": WeightedReward(Sharpness())}
    images = make_images(2, 8, 8).requires_grad_()
    reward = kind(parts)
    totals = [reward(images, PROMPTS), checkpoint(reward, images, PROMPTS, use_reentrant=False)]
    one, other = (torch.autograd.grad(total.sum(), images)[0] for total in totals)
    assert torch.equal(*totals)
    assert torch.equal(one, other)
