"""Advantages against numpy and against their definitions written out."""

import json
import tracemalloc
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.errors import ConfigurationError

GROUP = 4
NAMES = [name for name in ("a cat", "a dog", "a bed") for _ in range(GROUP)]


def rewards(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 + torch.randn(len(NAMES), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    values = rewards()
    ours = LeaveOneOut()(values, NAMES, GROUP)
    for i, value in enumerate(values):
        first = i - i % GROUP
        others = [values[j] for j in range(first, first + GROUP) if j != i]
        assert ours[i].item() == pytest.approx((value - sum(others) / len(others)).item())
    groups = values.view(-1, GROUP)
    torch.testing.assert_close(ours, (GROUP / (GROUP - 1) * (groups - groups.mean(1, keepdim=True))).flatten())
    assert ours.view(-1, GROUP).sum(1).abs().max() < 1e-12


def test_group_relative_advantages_equal_numpy() -> None:
    groups = rewards().view(-1, GROUP).numpy()
    centred = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(GroupRelative()(rewards(), NAMES, GROUP), centred.ravel())
    scaled = centred / (groups.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(GroupRelative(divide_by_std=True)(rewards(), NAMES, GROUP), scaled.ravel())


@pytest.mark.parametrize("advantage_estimator", [GroupRelative(), GroupRelative(divide_by_std=True), LeaveOneOut()])
@pytest.mark.parametrize("group", [3, 4, 7])
def test_equal_rewards_have_advantages_of_exactly_zero(advantage_estimator: AdvantageEstimator, group: int) -> None:
    """Also for group sizes for which the mean of equal numbers differs from them by rounding."""
    values = torch.tensor([0.1, 1e6 / 3, -7.7]).repeat_interleave(group)
    if group == 7:
        assert (values.view(-1, group).mean(1) != values[::group]).any()
    assert not advantage_estimator(values, ["a"] * len(values), group).any()


def test_epsilon_bounds_the_advantages_of_nearly_equal_rewards() -> None:
    """The 1e-6 added to the standard deviation halves the advantages of rewards that differ by 1e-6."""
    values = torch.tensor([0.0, 2e-6], dtype=torch.float64)
    advantages = PerPromptStatistics(4, 2)(values, ["a", "a"], 2)
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.5], dtype=torch.float64), rtol=1e-3, atol=0)
    assert not PerPromptStatistics(4, 2)(torch.ones(3), ["a"] * 3, 3).any()


def test_per_prompt_statistics_use_the_last_rewards_of_a_prompt() -> None:
    estimator, seen = PerPromptStatistics(buffer_size=10, min_count=8), defaultdict(list)
    for seed in range(4):
        values = rewards(seed)
        expected = np.empty(len(NAMES))
        for name, value in zip(NAMES, values.tolist(), strict=True):
            seen[name].append(value)
        for i, name in enumerate(NAMES):
            known = seen[name][-10:] if len(seen[name]) >= 8 else values.numpy()
            expected[i] = (values[i] - np.mean(known)) / (np.std(known) + 1e-6)
        np.testing.assert_allclose(estimator(values, NAMES, GROUP), expected, rtol=1e-5, atol=1e-6)


def test_per_prompt_statistics_are_restored_from_a_checkpoint() -> None:
    one, other = PerPromptStatistics(6, 5), PerPromptStatistics(6, 5)
    one(rewards(), NAMES, GROUP)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    ours, theirs = one(rewards(1), NAMES, GROUP), other(rewards(1), NAMES, GROUP)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, PerPromptStatistics(6, 5)(rewards(1), NAMES, GROUP))


class Recording(AdvantageEstimator):
    """A user's estimator that only has a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rewards: Tensor, prompts: Any, group: int) -> Tensor:
        self.calls += 1
        return rewards

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}


@pytest.mark.parametrize("make", [lambda: PerPromptStatistics(6, 5), Recording])
def test_marked_state_equals_the_state_at_the_mark(make: Any) -> None:
    estimator = make()
    estimator.mark()
    assert estimator.marked_state() == estimator.state_dict()
    for seed in range(3):
        before = estimator.state_dict()
        estimator.mark()
        for part in range(2):  # also with new prompts, and several changes of one prompt
            estimator(rewards(seed), [f"{name} {seed}" for name in NAMES], GROUP)
            estimator(rewards(seed + part), NAMES, GROUP)
        assert estimator.marked_state() == before
        assert estimator.state_dict() != before


def test_marking_does_not_depend_on_the_number_of_prompts() -> None:
    """Measured in bytes: none of 50,000 prompts is copied."""
    estimator = PerPromptStatistics(4, 2)
    names = [f"prompt {i}" for i in range(50_000)]
    estimator.load_state_dict({"seen": {name: [1.0, 2.0] for name in names}})
    tracemalloc.start()
    for _ in range(10):
        estimator.mark()
        estimator(torch.tensor([1.0, 2.0]), names[:2], 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupRelative(epsilon=0), "epsilon=0 must be a positive number"),
        (lambda: PerPromptStatistics(8, 16), "min_count=16 must be between 2 and 8"),
        (lambda: PerPromptStatistics(8, 1), "min_count=1 must be between 2 and 8"),
    ],
)
def test_invalid_settings_are_rejected(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
