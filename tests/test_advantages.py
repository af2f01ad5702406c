"""Baselines against numpy and against their definitions written out."""

import json
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


def test_leave_one_out_is_what_it_says() -> None:
    values = rewards()
    ours = LeaveOneOut()(values, NAMES, GROUP)
    for i, value in enumerate(values):
        first = i - i % GROUP
        others = [values[j] for j in range(first, first + GROUP) if j != i]
        assert ours[i].item() == pytest.approx((value - sum(others) / len(others)).item())
    groups = values.view(-1, GROUP)
    torch.testing.assert_close(ours, (GROUP / (GROUP - 1) * (groups - groups.mean(1, keepdim=True))).flatten())
    assert ours.view(-1, GROUP).sum(1).abs().max() < 1e-12


def test_group_mean_and_its_division() -> None:
    groups = rewards().view(-1, GROUP).numpy()
    centred = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(GroupRelative()(rewards(), NAMES, GROUP), centred.ravel())
    scaled = centred / (groups.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(GroupRelative(divide_by_std=True)(rewards(), NAMES, GROUP), scaled.ravel())


@pytest.mark.parametrize("advantage_estimator", [GroupRelative(), GroupRelative(divide_by_std=True), LeaveOneOut()])
def test_equal_rewards_teach_exactly_nothing(advantage_estimator: AdvantageEstimator) -> None:
    values = torch.tensor([0.1, 1e6 / 3, -7.7]).repeat_interleave(GROUP)
    assert not advantage_estimator(values, NAMES, GROUP).any()


def test_per_prompt_statistics_follow_the_last_rewards_of_a_prompt() -> None:
    baseline, seen = PerPromptStatistics(buffer_size=10, min_count=8), defaultdict(list)
    for seed in range(4):
        values = rewards(seed)
        expected = np.empty(len(NAMES))
        for name, value in zip(NAMES, values.tolist(), strict=True):
            seen[name].append(value)
        for i, name in enumerate(NAMES):
            known = seen[name][-10:] if len(seen[name]) >= 8 else values.numpy()
            expected[i] = (values[i] - np.mean(known)) / (np.std(known) + 1e-6)
        np.testing.assert_allclose(baseline(values, NAMES, GROUP), expected, rtol=1e-5, atol=1e-6)


def test_per_prompt_statistics_survive_a_checkpoint() -> None:
    one, other = PerPromptStatistics(6, 5), PerPromptStatistics(6, 5)
    one(rewards(), NAMES, GROUP)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    ours, theirs = one(rewards(1), NAMES, GROUP), other(rewards(1), NAMES, GROUP)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, PerPromptStatistics(6, 5)(rewards(1), NAMES, GROUP))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupRelative(epsilon=0), "epsilon=0 must be a positive number"),
        (lambda: PerPromptStatistics(8, 16), "min_count=16 must be between 2 and 8"),
        (lambda: PerPromptStatistics(8, 1), "min_count=1 must be between 2 and 8"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
