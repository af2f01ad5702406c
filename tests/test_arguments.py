"""Checks of constructor arguments."""

import math

import numpy as np
import pytest

from lightning_draft.arguments import (
    at_least,
    boolean,
    in_range,
    integer,
    integer_at_least,
    one_of,
    positive,
    prompt_list,
)
from lightning_draft.errors import ConfigurationError


def test_valid_values_are_returned_unchanged():
    assert at_least("k", 1, 1) == 1
    assert integer_at_least("k", 2, 1) == 2
    assert positive("beta", 0.5) == 0.5
    assert positive("beta", np.float32(0.5)) == 0.5
    assert type(integer("k", np.int64(2))) is int
    assert in_range("eta", 1.0, 0.0, 1.0) == 1.0
    assert one_of("mode", "step", ["step", "block"]) == "step"
    assert prompt_list(("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("value", [0, -3, math.nan, True, "2", None])
def test_at_least_rejects_small_values_and_other_types(value):
    with pytest.raises(ConfigurationError, match=r"k=.* must be at least 1; write 1 or more"):
        at_least("k", value, 1)


@pytest.mark.parametrize("value", [1.0, 1.5, math.nan, math.inf, True, "2", None])
def test_integers_are_no_other_numbers(value):
    with pytest.raises(ConfigurationError, match=r"k=.* must be an integer; write 1 or more$"):
        integer_at_least("k", value, 1)
    with pytest.raises(ConfigurationError, match=r"k=.* must be an integer; write a whole number such as 4$"):
        integer("k", value)
    with pytest.raises(ConfigurationError, match="k=0 must be at least 1; write 1 or more"):
        integer_at_least("k", 0, 1)


@pytest.mark.parametrize("value", ["false", 0, 1, None])
def test_switches_are_true_or_false(value):
    with pytest.raises(ConfigurationError, match=r"merge=.* must be true or false; write true$"):
        boolean("merge", value)
    assert boolean("merge", False) is False


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, False])
def test_positive_rejects_zero_negative_and_non_finite_values(value):
    with pytest.raises(ConfigurationError, match=r"beta=.* must be a positive number"):
        positive("beta", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_in_range_rejects_values_outside(value):
    with pytest.raises(ConfigurationError, match=r"eta=.* must be between 0 and 1; write a value such as 0"):
        in_range("eta", value, 0, 1)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_in_range_without_its_upper_end_rejects_that_end(value):
    assert in_range("decay", 0.99, 0, 1, below_high=True) == 0.99
    with pytest.raises(ConfigurationError, match=r"decay=.* must be at least 0 and less than 1; write a value such as"):
        in_range("decay", value, 0, 1, below_high=True)


def test_one_of_suggests_the_most_similar_choice():
    with pytest.raises(ConfigurationError, match=r"mode='blok' .* one of step, block; did you mean block$"):
        one_of("mode", "blok", ["step", "block"])


@pytest.mark.parametrize("prompts", ["a cat", [], None, ["a", 1], {"prompt": "a"}, [b"a"], 3])
def test_prompt_list_rejects_other_values_than_lists_of_strings(prompts):
    with pytest.raises(ConfigurationError, match="prompts"):
        prompt_list(prompts)
