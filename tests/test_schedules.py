"""Noise schedules and the conversion of predictions."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Prediction, to_x0
from lightning_draft.models.scheduler_config import trigonometric_flow
from lightning_draft.schedules import EmpiricalFlow, RectifiedFlow, Schedule, TrigonometricFlow, VariancePreserving
from lightning_draft.testing import scaled_linear

VP_TIMES, FLOW_TIMES = [0, 1, 500, 999], [0.001, 0.3, 0.999]


def test_table_equals_that_of_stable_diffusion() -> None:
    schedule = scaled_linear()
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915)
    assert schedule.coefficients(999)[0] == pytest.approx(0.068265, abs=1e-6)  # Lin et al., arXiv:2305.08891, section 3


def test_a_longer_table_is_the_same_process() -> None:
    coarse, fine = scaled_linear(1000), scaled_linear(16000)
    for t in (99, 499, 899):
        assert fine.alphas_cumprod[16 * t + 15] == pytest.approx(coarse.alphas_cumprod[t], rel=2e-2)


@pytest.mark.parametrize("t", [0, 17, 999, -1, -20])
def test_variance_is_preserved(t: int) -> None:
    alpha, sigma = scaled_linear(final_alpha_cumprod=None).coefficients(t)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("to_one", "end"), [(True, (1.0, 0.0)), (False, (math.sqrt(0.9), math.sqrt(0.1)))])
def test_negative_time_is_the_end_of_the_chain(to_one: bool, end: tuple[float, float]) -> None:
    table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = VariancePreserving.from_table(table, set_alpha_to_one=to_one)
    assert schedule.coefficients(-1) == pytest.approx(end)
    assert schedule.num_train_timesteps == 3
    assert RectifiedFlow().coefficients(-1) == (1.0, 0.0)


def test_log_snr_is_infinite_at_the_ends() -> None:
    schedule = VariancePreserving((1.0, 0.5, 0.0))
    assert schedule.log_snr(0) == math.inf
    assert schedule.log_snr(1) == pytest.approx(0)
    assert schedule.log_snr(2) == -math.inf
    assert RectifiedFlow().log_snr(0.25) == pytest.approx(math.log(3))


def test_rectified_flow_is_a_straight_line() -> None:
    schedule = RectifiedFlow(shift=3.0)
    assert schedule.coefficients(0.25) == (0.75, 0.25)
    assert schedule.network_time(0.25) == 250
    assert [schedule.shifted(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.75, 1])


def test_error_for_an_unknown_grid_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="leading, trailing, linspace"):
        VariancePreserving((0.9,), spacing="even")  # type: ignore[arg-type]


def raw_output(prediction: Prediction, x0: torch.Tensor, eps: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The output of a perfect network."""
    return {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "sample": x0,
    }[prediction]


@pytest.mark.parametrize(
    ("prediction", "schedule", "times"),
    [
        ("epsilon", scaled_linear(), VP_TIMES),
        ("v_prediction", scaled_linear(), VP_TIMES),
        ("sample", scaled_linear(), VP_TIMES),
        ("epsilon", RectifiedFlow(), FLOW_TIMES),
        ("flow", RectifiedFlow(), FLOW_TIMES),
        ("sample", RectifiedFlow(), FLOW_TIMES),
    ],
)
def test_every_prediction_type_is_converted_to_x0(
    prediction: Prediction, schedule: Schedule, times: list[float]
) -> None:
    x0, eps = torch.randn(2, 5, dtype=torch.float64)
    for t in times:
        alpha, sigma = schedule.coefficients(t)
        raw = raw_output(prediction, x0, eps, alpha, sigma)
        torch.testing.assert_close(to_x0(raw, alpha * x0 + sigma * eps, alpha, sigma, prediction), x0)


def test_error_for_an_unknown_prediction_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="epsilon, v_prediction, flow or sample"):
        to_x0(torch.ones(1), torch.ones(1), 1.0, 0.0, "score")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [64, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
def test_shift_of_flux_2_equals_that_of_diffusers(tokens: int, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    times = [1 - i / steps for i in range(steps)]
    scheduler.set_timesteps(sigmas=times, mu=compute_empirical_mu(tokens, steps))
    ours = torch.tensor(EmpiricalFlow(last="even", tokens=tokens).times(steps))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_trigonometric_flow_is_a_rescaled_rectified_flow_with_the_angles_of_diffusers(steps: int) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    angles = scheduler.timesteps[:-1].double()
    times = torch.tensor(TrigonometricFlow().times(steps), dtype=torch.float64)
    scale = angles.cos() + angles.sin()
    torch.testing.assert_close(1 - times, angles.cos() / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(times, angles.sin() / scale, rtol=0, atol=1e-5)


def test_a_scheduler_of_another_flow_is_no_trigonometric_flow() -> None:
    with pytest.raises(ConfigurationError, match="FlowMatchEulerDiscreteScheduler is not made for trigonometric flows"):
        trigonometric_flow(FlowMatchEulerDiscreteScheduler())
