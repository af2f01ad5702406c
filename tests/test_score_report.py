"""Comparisons of scored images against closed forms."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lightning_draft.errors import ConfigurationError
from lightning_draft.score_report import compare, report
from lightning_draft.score_table import ScoredImage


def scored(values: Sequence[float], prompt: str = "a") -> list[ScoredImage]:
    return [ScoredImage(f"{i}.png", prompt, {"r": value}) for i, value in enumerate(values)]


def test_a_comparison_agrees_with_the_normal_approximation() -> None:
    generator = np.random.default_rng(1)
    a = generator.normal(0, 1, 400)
    difference = generator.normal(0.3, 0.5, 400)
    (found,) = compare(scored(a), scored(a + difference), resamples=4000)
    assert found.difference == pytest.approx(difference.mean())
    half = 1.96 * difference.std(ddof=1) / math.sqrt(400)
    assert found.difference_interval == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.006)
    rate = (difference > 0).mean()
    half = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert found.win_rate == pytest.approx(rate)
    assert found.win_rate_interval == pytest.approx((rate - half, rate + half), abs=0.006)
    assert "| r | " in report([found], "base", "tuned")


def test_ties_count_as_half_a_win_and_the_order_reverses_the_sign() -> None:
    first, second = scored([1, 2, 3, 4]), scored([1, 3, 2, 5])
    (found,), (reverse,) = compare(first, second), compare(second, first)
    assert (found.win_rate, reverse.win_rate) == (0.625, 0.375)
    assert found.difference == -reverse.difference == 0.25
    renamed = [ScoredImage(f"other{i}.png", row.prompt, row.scores) for i, row in enumerate(second)]
    assert compare(first, renamed) == compare(first, second)
    with pytest.raises(ConfigurationError, match="no images in common"):
        compare(first, [ScoredImage("x.png", "b", {"r": 1.0})])
    other_prompt = [ScoredImage(first[0].file, "b", {"r": 1.0})]
    with pytest.raises(
        ConfigurationError, match=f"{first[0].file} has the prompt '.*' in the first and 'b' in the sec"
    ):
        compare(first, other_prompt)


def test_images_of_one_prompt_are_resampled_together() -> None:
    """With equal differences within a prompt, the interval is that of one pair per prompt."""
    generator = np.random.default_rng(2)
    per_prompt = generator.normal(0.2, 1, 40)
    one = [ScoredImage(f"{i}.png", f"p{i}", {"r": d}) for i, d in enumerate(per_prompt)]
    many = [ScoredImage(f"{i}_{k}.png", f"p{i}", {"r": d}) for i, d in enumerate(per_prompt) for k in range(5)]
    (single,), (clustered,) = (compare([zeroed(row) for row in rows], rows) for rows in (one, many))
    assert (single.sampled, clustered.sampled, clustered.pairs) == ("40 prompts", "40 prompts", 200)
    assert clustered.difference_interval == pytest.approx(single.difference_interval)
    assert "by bootstrap over the 40 prompts" in report([clustered], "a", "b")


def zeroed(row: ScoredImage) -> ScoredImage:
    return ScoredImage(row.file, row.prompt, {"r": 0.0})


def test_the_interval_of_a_win_rate_of_1_is_exact() -> None:
    (found,) = compare(scored([0.0] * 8), scored([1.0] * 9))
    low, high = found.win_rate_interval
    assert low**8 == pytest.approx(0.025)
    assert high == 1.0
    assert "Images without a counterpart, not compared: 1 of b." in report([found], "a", "b")


def test_other_suffixes_are_paired_by_name() -> None:
    first = [ScoredImage(f"{i}.png", "a", {"r": float(i)}) for i in range(4)]
    second = [ScoredImage(f"{i}.jpg", "a", {"r": float(i) + 1}) for i in (3, 1, 2, 0)]
    (found,) = compare(first, second)
    assert found.difference_interval == (1.0, 1.0)
