"""Advantages from preferences against closed forms, and in training with a judge that compares images."""

import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.advantages import GroupRelative
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.objectives import PPO
from lightning_draft.preferences import BradleyTerry, WinRate, bradley_terry, compare_scores, win_rates
from lightning_draft.rewards import PairwiseReward, WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel
from tests.rewards.chat_server import gray
from tests.tiny_policy_gradients import MILD, fit, linear

REWARDS = torch.tensor([3.0, 1.0, 2.0, 2.0, -5.0, 7.0, 7.0, 0.5])


def test_win_rate_is_the_fraction_of_others_that_a_sample_beats() -> None:
    """Equal scores count half."""
    rates = win_rates(compare_scores(REWARDS, 4))
    expected = torch.tensor([[3, 0, 1.5, 1.5], [0, 2.5, 2.5, 1]], dtype=torch.float64) / 3
    torch.testing.assert_close(rates, expected)
    standardized = (expected - 0.5) / (expected.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(WinRate()(REWARDS, ["a"] * 4 + ["b"] * 4, 4), standardized.flatten().float())
    torch.testing.assert_close(WinRate(divide_by_std=False)(REWARDS, (), 4), (expected - 0.5).flatten().float())


@pytest.mark.parametrize("group", [2, 3, 8])
def test_advantages_of_different_scores_depend_only_on_their_order(group: int) -> None:
    """For K ranks the win rates are 0, 1 / (K - 1), ..., 1, with variance (K + 1) / (12 (K - 1))."""
    scores = torch.arange(group, dtype=torch.float64).exp() * 1e-6
    std = math.sqrt((group + 1) / (12 * (group - 1)))
    expected = (torch.arange(group) / (group - 1) - 0.5) / (std + 1e-4)
    torch.testing.assert_close(WinRate()(scores, (), group), expected.double())
    for advantages in (WinRate()(torch.ones(group), (), group), BradleyTerry()(torch.ones(group), (), group)):
        assert not advantages.any()


@pytest.mark.parametrize(("probability", "prior_std"), [(0.8, 1.0), (0.5, 1.0), (1.0, 2.0), (0.01, 10.0)])
def test_two_samples_have_the_scores_of_the_closed_form(probability: float, prior_std: float) -> None:
    """Their difference d solves p - sigmoid(d) = d / (2 prior_std^2), found by bisection."""
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        above = probability - 1 / (1 + math.exp(-middle)) > middle / (2 * prior_std**2)
        low, high = (middle, high) if above else (low, middle)
    wins = torch.tensor([[[0.5, probability], [1 - probability, 0.5]]])
    scores = BradleyTerry(prior_std).from_preferences(wins)
    assert scores.tolist() == pytest.approx([low / 2, -low / 2], abs=1e-7)


def test_preferences_of_a_bradley_terry_model_give_its_scores() -> None:
    truth = torch.tensor([[0.3, -1.0, 1.1, -0.4]], dtype=torch.float64)
    wins = (truth[:, :, None] - truth[:, None, :]).sigmoid()
    torch.testing.assert_close(bradley_terry(wins, 1e6), truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(bradley_terry(3 * wins, 1.0), bradley_terry(wins, math.sqrt(3)), rtol=0, atol=1e-9)


def test_incomplete_comparisons_maximize_the_posterior() -> None:
    """Against 200 steps of gradient ascent on the log-posterior with automatic differentiation."""
    wins = torch.tensor([[[0, 3, 0, 1], [1, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]]], dtype=torch.float64)
    scores = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        likelihood = (wins * torch.nn.functional.logsigmoid(scores[:, :, None] - scores[:, None, :])).sum()
        (gradient,) = torch.autograd.grad(likelihood - scores.square().sum() / 2, scores)
        scores = (scores + 0.3 * gradient).detach().requires_grad_()
    found = bradley_terry(wins, 1.0)
    torch.testing.assert_close(found, scores.detach(), rtol=0, atol=1e-8)
    assert abs(float(found.sum())) < 1e-9


class Brighter(PairwiseReward):
    """Prefer the brighter image with a known probability; the score of an image is useless."""

    def __init__(self, needs_pairs: bool = True) -> None:
        super().__init__()
        self.needs_pairs = needs_pairs
        self.pairs: list[str] = []

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(images))

    def prefer(self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        self.pairs += prompts
        levels = [torch.tensor([255 * gray(image) for image in side]) for side in (first, second)]
        return (levels[0] - levels[1]).mul(0.05).sigmoid()


def test_all_pairs_of_a_prompt_are_compared_once() -> None:
    levels = torch.tensor([10.0, 30.0, 20.0, 90.0, 80.0, 70.0]) / 255
    reward, prompts = Brighter(), ["a"] * 3 + ["b"] * 3
    table = reward.preferences(levels.view(6, 1, 1, 1).expand(6, 3, 4, 4), prompts, 3)
    grays = (255 * levels).view(2, 3)
    torch.testing.assert_close(table, ((grays[:, :, None] - grays[:, None, :]) * 0.05).sigmoid())
    assert reward.pairs == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("estimator", [WinRate(), BradleyTerry()])
def test_training_uses_the_preferences_of_a_judge(tmp_path: Path, estimator: Any) -> None:
    """The judge prefers brighter images and gives equal scores; the model can only scale its images."""
    reward = Brighter()
    module: PolicyGradientModule = linear(
        model=LinearModel(0.1, schedule=MILD),
        sampler=DDIM(3, eta=1.0),
        reward=reward,
        objective=PPO(clip=1e-2),
        advantage_estimator=estimator,
        samples_per_prompt=4,
        micro_batch_size=3,
    )
    recorder = fit(tmp_path, module, steps=1, accumulate_grad_batches=3)
    rollout = module.buffer.rollout
    assert rollout is not None
    images = rollout.latents[-1].clamp(0, 1)
    expected = estimator.from_preferences(Brighter().preferences(images, rollout.prompts, 4)).float()
    torch.testing.assert_close(rollout.advantages, expected)
    assert recorder.of("train/zero_advantage_groups") == [0]
    assert len(reward.pairs) == 2 * 6


@pytest.mark.parametrize(
    ("reward", "estimator"),
    [(Brighter(), GroupRelative()), (WeightedSum({"judge": WeightedReward(Brighter())}), WinRate())],
)
def test_a_judge_without_scores_needs_an_estimator_that_compares(tmp_path: Path, reward: Any, estimator: Any) -> None:
    with pytest.raises(ConfigurationError, match="Brighter only compares images.*WinRate or BradleyTerry"):
        fit(tmp_path, linear(reward=reward, advantage_estimator=estimator), steps=1)


@pytest.mark.parametrize("make", [lambda: WinRate(epsilon=0), lambda: BradleyTerry(prior_std=-1)])
def test_invalid_settings_are_rejected(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a positive number"):
        make()


def test_compared_scores_are_antisymmetric() -> None:
    for order in permutations([0.0, 1.0, 1.0]):
        table = compare_scores(torch.tensor(order), 3)
        torch.testing.assert_close(table + table.mT, torch.ones(1, 3, 3, dtype=torch.float64))
