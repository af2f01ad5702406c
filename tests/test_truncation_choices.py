"""Random choices of truncations: frequencies of 3000 choices lie within 4.5 standard errors."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain, State
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, RandomK, RandomSteps, ReFL, Truncation
from tests.truncation_by_hand import linear

DRAWS = 3000


@dataclass(frozen=True, eq=False)
class Recorder(SamplingChain):
    """Samples nothing, and records which network calls would have a gradient."""

    calls: list[bool] = field(default_factory=list, kw_only=True)

    def advance(
        self, state: State, steps: int | None = None, *, input_gain: float = 1.0, output_gain: float = 1.0
    ) -> State:
        steps = self.num_steps - state.step if steps is None else steps
        self.calls.extend([torch.is_grad_enabled() and output_gain != 0] * steps)
        return State(state.x, state.step + steps)

    def predict(self, state: State, *, input_gain: float = 1.0, output_gain: float = 1.0) -> Tensor:
        self.calls.append(torch.is_grad_enabled() and output_gain != 0)
        return state.x


def frequencies(truncation: Truncation, key: Callable[[list[bool]], Any], steps: int = 4) -> Counter[Any]:
    """Return the frequency of each outcome; `key` maps the network calls with gradient to an outcome."""
    model = linear()
    chain = Recorder(model, DDIM(steps), model.encode(["a"]), generator=torch.Generator().manual_seed(1))
    counts: Counter[Any] = Counter()
    for _ in range(DRAWS):
        chain.calls.clear()
        truncation(chain, torch.ones(1, 1))
        counts[key(chain.calls)] += 1
    return counts


def assert_frequency(count: int, probability: float) -> None:
    error = (probability * (1 - probability) / DRAWS) ** 0.5
    assert abs(count / DRAWS - probability) < 4.5 * error


def test_refl_stops_uniformly_over_the_last_m_steps() -> None:
    counts = frequencies(ReFL(m=3), len)
    assert set(counts) == {2, 3, 4}
    for count in counts.values():
        assert_frequency(count, 1 / 3)


def test_random_k_is_uniform() -> None:
    counts = frequencies(RandomK(), sum)
    assert set(counts) == {1, 2, 3, 4}
    for count in counts.values():
        assert_frequency(count, 1 / 4)
    assert set(frequencies(RandomK(max_k=2), sum)) == {1, 2}


def test_random_steps_probability_is_linear_and_an_empty_choice_uses_the_last_step() -> None:
    counts = frequencies(RandomSteps(), tuple)
    nothing = (4 / 5) * (3 / 5) * (2 / 5) * (1 / 5)
    for i in range(4):
        count = sum(number for calls, number in counts.items() if calls[i])
        assert_frequency(count, (i + 1) / 5 + (nothing if i == 3 else 0))
    assert (False,) * 4 not in counts


@pytest.mark.parametrize(("coverage", "first"), [("uniform", {0, 1, 2}), ("end", {1, 2})])
def test_drtune_step_positions_are_uniform(coverage: Any, first: set[int]) -> None:
    """Two of five steps with a distance of two have three positions; `end` excludes the first of them."""
    counts = frequencies(DRTune(k=2, m=1, coverage=coverage), tuple, steps=5)
    assert {calls.index(True) for calls in counts} == first
    for calls, number in counts.items():
        assert sum(calls) == 2
        assert_frequency(number, 1 / len(first))


def test_late_bias_selects_late_steps_more_often() -> None:
    counts = frequencies(DRTune(k=1, m=0, late_bias=2.0), tuple, steps=4)
    for calls, number in counts.items():
        assert_frequency(number, (calls.index(True) + 1) ** 2 / 30)


def test_drtune_steps_are_evenly_spaced_and_the_stop_is_uniform() -> None:
    counts = frequencies(DRTune(k=2, m=3), tuple, steps=8)
    stops: Counter[int] = Counter()
    for calls, number in counts.items():
        stops[len(calls)] += number
        first, second = (i for i, used in enumerate(calls) if used)
        assert second - first == len(calls) // 2
    assert set(stops) == {6, 7, 8}
    for count in stops.values():
        assert_frequency(count, 1 / 3)
    whole = {calls: number for calls, number in counts.items() if len(calls) == 8}
    assert len(whole) == 4  # offsets 0..3
    for number in whole.values():
        assert_frequency(number, 1 / 12)
