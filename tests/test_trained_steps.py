"""Which steps a truncation trains, against what each truncation says of itself."""

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import to_x0
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow, Schedule, Spacing
from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.testing import scaled_linear
from lightning_draft.trained_steps import last_step_coefficient, trained_steps
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

T = 6
SAMPLERS: list[tuple[Sampler, Schedule]] = [
    (DDIM(T), scaled_linear()),
    (DDIM(T, eta=1.0), scaled_linear()),
    (DPMSolverPlusPlus(T), scaled_linear()),
    (FlowEuler(T), RectifiedFlow()),
    (FlowSDE(T), RectifiedFlow()),
]
samplers = pytest.mark.parametrize(("sampler", "schedule"), SAMPLERS, ids=lambda s: type(s).__name__)


@samplers
@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Full(), {0, 1, 2, 3, 4, 5}),
        (LastK(1), {5}),
        (LastK(4), {2, 3, 4, 5}),
        (LowVariance(3), {5}),
        (DRTune(k=6, m=0), {0, 1, 2, 3, 4, 5}),
        (ReFL(m=1), {5}),
        (DirectAlign(low=2, high=2), {4}),
        (FlowBPBridge(k=6), {0, 1, 2, 3, 4, 5}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trained_steps(sampler: Sampler, schedule: Schedule, truncation: Truncation, expected: set[int]) -> None:
    if isinstance(sampler, DPMSolverPlusPlus) and isinstance(truncation, DRTune):
        expected = {5}  # its last step is the prediction of x_0, and ends the linear path
    assert trained_steps(truncation, sampler, schedule).keys() == expected


@samplers
@pytest.mark.parametrize(
    ("truncation", "only"),
    [
        (LastK(1), True),
        (LastK(2), False),
        (LowVariance(2), True),
        (ReFL(m=1), True),
        (ReFL(m=2), False),
        (RandomK(max_k=1), True),
        (RandomK(max_k=2), False),
        (RandomSteps(), False),
        (DRTune(k=1, m=2), False),
        (DirectAlign(low=1, high=1), True),
        (LeapAlign(), False),
        (FlowBPLagrange(), False),
        (FlowBPBridge(k=2), False),
        (Full(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_have_a_coefficient_of_the_last_step(
    sampler: Sampler, schedule: Schedule, truncation: Truncation, only: bool
) -> None:
    assert (last_step_coefficient(truncation, sampler, schedule) is not None) == only


# The coefficient of the last step.


@pytest.mark.parametrize(
    ("spacing", "offset", "final", "digits"),
    [
        ("leading", 0, None, "0.0000"),
        ("leading", 1, None, "-0.0121"),
        ("trailing", 0, None, "-0.1052"),
        ("trailing", 0, 1.0, "-0.1345"),
    ],
)
def test_last_coefficient_on_the_grids_of_stable_diffusion(
    spacing: Spacing, offset: int, final: float | None, digits: str
) -> None:
    schedule = scaled_linear(spacing=spacing, steps_offset=offset, final_alpha_cumprod=final)
    coefficient = last_step_coefficient(LastK(1), DDIM(50), schedule)
    assert coefficient is not None
    assert f"{coefficient:.4f}" == digits
    assert (coefficient == 0) == (digits == "0.0000")


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        (DDIM(50, eta=1.0), scaled_linear(final_alpha_cumprod=None)),
        (DDIM(7), scaled_linear()),
        (DPMSolverPlusPlus(20), scaled_linear(spacing="leading")),
        (FlowEuler(28), RectifiedFlow(3.0)),
        (FlowSDE(10), RectifiedFlow()),
    ],
)
def test_last_coefficient_equals_the_derivative(sampler: Sampler, schedule: Schedule) -> None:
    (t, s), x = sampler.grid(schedule)[-1], torch.randn(1, 1, dtype=torch.float64)
    eps = torch.randn(1, 1, dtype=torch.float64, requires_grad=True)
    x0 = to_x0(eps, x, *schedule.coefficients(t), "epsilon")
    sampler.step(schedule, x, x0, t, s)[0].mean.backward()
    assert eps.grad is not None
    assert last_step_coefficient(LastK(1), sampler, schedule) == pytest.approx(eps.grad.item())


def test_one_step_from_pure_noise_has_an_infinite_coefficient() -> None:
    assert last_step_coefficient(LastK(1), FlowEuler(1), RectifiedFlow()) == -math.inf


# Truncations of the user's own.


class Detached(Truncation):
    """Run every step with gradient, and cut the graph before the last one."""

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        state = chain.advance(chain.start(noise), chain.num_steps - 1)
        return chain.advance(type(state)(state.x.detach(), state.step, state.solver_state)).x


class NeedsTheModel(Truncation):
    def __call__(self, chain: Any, noise: Tensor) -> Tensor:
        chain.model.unet.config.attention_head_dim  # noqa: B018
        return LastK(1)(chain, noise)


class WithoutGradient(Truncation):
    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        return LastK(2)(chain, noise).detach()


@pytest.mark.parametrize(
    ("truncation", "only"), [(Detached(), True), (NeedsTheModel(), False), (WithoutGradient(), False)]
)
def test_a_truncation_of_the_user_s_own_declares_nothing(truncation: Truncation, only: bool) -> None:
    assert (last_step_coefficient(truncation, DDIM(T), scaled_linear()) is not None) == only


def test_more_steps_than_the_sampler_has_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="k=7 exceeds the sampler's num_steps=6"):
        last_step_coefficient(LastK(7), DDIM(T), scaled_linear())


def test_neither_the_random_state_nor_much_time_is_used() -> None:
    state, start = torch.get_rng_state(), time.process_time()
    assert last_step_coefficient(LowVariance(2), DDIM(50, eta=1.0), scaled_linear())
    assert time.process_time() - start < 2
    assert torch.equal(torch.get_rng_state(), state)
