"""Samplers against diffusers' schedulers of the same name, exact Gaussians and torch.distributions."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning, Prediction, to_x0
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow, Schedule, Spacing, VariancePreserving
from lightning_draft.testing import GaussianModel, scaled_linear
from lightning_draft.transition import Transition

BETAS = ["scaled_linear", "linear", "squaredcos_cap_v2"]
GRIDS: list[tuple[Spacing, int]] = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
STEPS = [1, 7, 10, 48, 61]  # 7, 48 and 61 do not divide 1000; 48 has ties to round; at 61 diffusers adds a step at -1
PREDICTIONS: list[Prediction] = ["epsilon", "v_prediction"]
NOTHING = Conditioning({})


def network(x: Tensor, t: float) -> Tensor:
    """A smooth function of the latent and the time."""
    return torch.tanh(0.7 * x + float(t) / 500 - 1)


def config(betas: str, grid: tuple[Spacing, int], prediction: Prediction) -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": betas,
        "timestep_spacing": grid[0],
        "steps_offset": grid[1],
        "prediction_type": prediction,
    }


def widen(reference: Any, to_one: bool = True) -> VariancePreserving:
    """Convert a diffusers scheduler's tables to float64, and build our schedule from them."""
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else reference.alphas_cumprod[0]
    return VariancePreserving.from_table(
        reference.alphas_cumprod,
        set_alpha_to_one=to_one,
        spacing=reference.config.timestep_spacing,
        steps_offset=reference.config.steps_offset,
    )


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = theirs.abs().max().clamp(min=1)
    torch.testing.assert_close(ours / scale, theirs.to(ours) / scale, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_equal_those_of_diffusers_for_every_number_of_steps(spacing: Spacing) -> None:
    ddim = DDIMScheduler(timestep_spacing=spacing)
    dpm = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    schedule = scaled_linear(spacing=spacing)
    for steps in [*range(1, 120), *range(120, 1000, 7), 999, 1000]:
        ddim.set_timesteps(steps)
        assert [t for t, _ in DDIM(steps).grid(schedule)] == ddim.timesteps.tolist()[:steps]
        if steps < 1000:
            dpm.set_timesteps(steps)
            assert [t for t, _ in DPMSolverPlusPlus(steps).grid(schedule)] == dpm.timesteps.tolist()[:steps]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}{grid[1]}")
@pytest.mark.parametrize("betas", BETAS)
def test_ddim_equals_diffusers(betas: str, grid: tuple[Spacing, int], to_one: bool, eta: float) -> None:
    for prediction in PREDICTIONS:
        for steps in STEPS:
            reference = DDIMScheduler(clip_sample=False, **config(betas, grid, prediction))
            schedule = widen(reference, to_one)
            reference.set_timesteps(steps)
            sampler = DDIM(steps, eta=eta)
            x = torch.randn(2, 3, dtype=torch.float64)
            for (t, s), time in zip(sampler.grid(schedule), reference.timesteps[:steps], strict=True):
                raw, z = network(x, t), torch.randn_like(x)
                x0 = to_x0(raw, x, *schedule.coefficients(t), prediction)
                ours = sampler.step(schedule, x, x0, t, s)[0].rsample(z)
                x = reference.step(raw, int(time), x, eta=eta, variance_noise=z if eta else None).prev_sample
                assert_same(ours, x, 1e-10)


@pytest.mark.parametrize("steps", [7, 10, 48])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("betas", BETAS)
def test_ddim_with_eta_1_equals_ddpm_ancestral_sampling(betas: str, offset: int, steps: int) -> None:
    """On leading grids, on which both schedulers have equal steps."""
    for prediction in PREDICTIONS:
        reference = DDPMScheduler(
            clip_sample=False, variance_type="fixed_small", **config(betas, ("leading", offset), prediction)
        )
        schedule = widen(reference)
        reference.set_timesteps(steps)
        sampler = DDIM(steps, eta=1.0)
        x = torch.randn(2, 3, dtype=torch.float64)
        for t, s in sampler.grid(schedule):
            raw = network(x, t)
            x0 = to_x0(raw, x, *schedule.coefficients(t), prediction)
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
            ours = sampler.step(schedule, x, x0, t, s)[0].rsample(z)
            x = reference.step(raw, int(t), x, generator=torch.Generator().manual_seed(5)).prev_sample
            # Their variance is clamped from below at 1e-20, so their last step is not quite noiseless.
            assert_same(ours, x, 1e-9)


def test_ddim_on_a_zero_terminal_snr_schedule_equals_diffusers() -> None:
    reference = DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, **config("scaled_linear", ("trailing", 0), "v_prediction")
    )
    schedule = widen(reference)
    assert schedule.coefficients(999) == (0.0, 1.0)
    reference.set_timesteps(10)
    sampler, x = DDIM(10), torch.randn(2, 3, dtype=torch.float64)
    for t, s in sampler.grid(schedule):
        x0 = to_x0(network(x, t), x, *schedule.coefficients(t), "v_prediction")
        ours = sampler.step(schedule, x, x0, t, s)[0].mean
        x = reference.step(network(x, t), int(t), x).prev_sample
        assert_same(ours, x, 1e-10)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}{grid[1]}")
@pytest.mark.parametrize("betas", BETAS)
def test_dpm_solver_equals_diffusers(betas: str, grid: tuple[Spacing, int]) -> None:
    """Up to the float32 rounding of diffusers' tables and updates."""
    for prediction in PREDICTIONS:
        for steps in STEPS[:-1]:
            reference = DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver++", solver_order=2, **config(betas, grid, prediction)
            )
            schedule = widen(reference)
            reference.set_timesteps(steps)
            sampler = DPMSolverPlusPlus(steps)
            x, solver_state = torch.randn(2, 3, dtype=torch.float64), None
            for (t, s), time in zip(sampler.grid(schedule), reference.timesteps, strict=True):
                x0 = to_x0(network(x, t), x, *schedule.coefficients(t), prediction)
                ours, solver_state = sampler.step(schedule, x, x0, t, s, solver_state)
                x = reference.step(network(x, t), time, x).prev_sample.double()
                assert_same(ours.mean, x, 2e-6)


def test_dpm_solver_starts_from_pure_noise() -> None:
    """Without signal at the first time, `lambda` is minus infinity, and the step is of first order."""
    schedule = VariancePreserving((0.9, 0.5, 0.1, 0.0), spacing="trailing")
    sampler, x = DPMSolverPlusPlus(4), torch.ones(1, 1, dtype=torch.float64)
    x0, solver_state = torch.full_like(x, 0.5), None
    ours, solver_state = sampler.step(schedule, x, x0, 3, 2, solver_state)
    alpha, sigma = schedule.coefficients(2)
    torch.testing.assert_close(ours.mean, alpha * x0 + sigma * x)
    again, _ = sampler.step(schedule, x, 2 * x0, 2, 1, solver_state)
    torch.testing.assert_close(again.mean, sampler.step(schedule, x, 2 * x0, 2, 1)[0].mean)


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_equals_diffusers(shift: float, steps: int) -> None:
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    schedule, sampler = RectifiedFlow(shift), FlowEuler(steps)
    x = torch.randn(2, 3, dtype=torch.float64)
    for (t, s), time in zip(sampler.grid(schedule), reference.timesteps, strict=True):
        assert schedule.network_time(t) == pytest.approx(time.item(), rel=1e-6)
        raw = network(x, schedule.network_time(t))
        ours = sampler.step(schedule, x, to_x0(raw, x, *schedule.coefficients(t), "flow"), t, s)[0].mean
        x = reference.step(raw, time, x).prev_sample.double()
        assert_same(ours, x, 1e-6)


@pytest.mark.parametrize("steps", [2, 10])
def test_flow_sde_equals_flow_grpo(steps: int) -> None:
    """The update of the authors' code, except for the last step, which adds no noise here."""
    schedule, sampler = RectifiedFlow(3.0), FlowSDE(steps, noise_level=0.7)
    grid = sampler.grid(schedule)
    x, velocity = torch.randn(2, 2, 3, dtype=torch.float64)
    for t, s in grid[:-1]:
        std = math.sqrt(t / (1 - (grid[0][1] if t == 1 else t))) * 0.7
        dt = s - t
        mean = x * (1 + std**2 / (2 * t) * dt) + velocity * (1 + std**2 * (1 - t) / (2 * t)) * dt
        ours = sampler.step(schedule, x, x - t * velocity, t, s)[0]
        torch.testing.assert_close(ours.mean, mean)
        assert ours.std == pytest.approx(std * math.sqrt(-dt))
    assert sampler.step(schedule, x, x, *grid[-1])[0].std == 0


def test_flow_sde_without_noise_equals_flow_euler() -> None:
    schedule, (x, x0) = RectifiedFlow(3.0), torch.randn(2, 2, 3, dtype=torch.float64)
    quiet, euler = FlowSDE(5, noise_level=0.0), FlowEuler(5)
    for t, s in euler.grid(schedule):
        ours = quiet.step(schedule, x, x0, t, s)[0]
        assert ours.std == 0
        torch.testing.assert_close(ours.mean, euler.step(schedule, x, x0, t, s)[0].mean)


# Orders of convergence and marginals, on data whose flow and marginals are known exactly.

FINE = scaled_linear(16000)


def even_times(schedule: Schedule, steps: int) -> list[float]:
    """Times from high to low noise, with the same ends for any number of steps."""
    if isinstance(schedule, RectifiedFlow):
        return [0.9 - 0.8 * i / steps for i in range(steps + 1)]
    return [14400 - i * (12800 // steps) for i in range(steps + 1)]


def transport_error(sampler: Sampler, schedule: Schedule, steps: int) -> float:
    model, times = GaussianModel(0.5, 0.3, schedule), even_times(schedule, steps)
    start = torch.tensor([[1.3]], dtype=torch.float64)
    x, solver_state = start, None
    for t, s in pairwise(times):
        transition, solver_state = sampler.step(schedule, x, model.denoise(x, t, NOTHING), t, s, solver_state)
        x = transition.mean
    return abs((x - model.transport(start, times[0], times[-1])).item())


def moments(sampler: Sampler, model: GaussianModel, times: Sequence[float]) -> tuple[float, float]:
    """The exact mean and variance at the last time; every transition is affine in the latent."""
    mean, std = model.marginal(times[0])
    variance = std**2
    for t, s in pairwise(times):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        transition = sampler.step(model.schedule, x, model.denoise(x, t, NOTHING), t, s)[0]
        offset, end = transition.mean.flatten().tolist()
        mean, variance = offset + (end - offset) * mean, (end - offset) ** 2 * variance + transition.std**2
    return mean, variance


@pytest.mark.parametrize(
    ("sampler", "schedule", "order"),
    [
        pytest.param(DDIM(1), FINE, 1, id="DDIM"),
        pytest.param(DPMSolverPlusPlus(1), FINE, 2, id="DPMSolverPlusPlus"),
        pytest.param(FlowEuler(1), RectifiedFlow(), 1, id="FlowEuler"),
    ],
)
def test_samplers_have_their_order_of_convergence(sampler: Sampler, schedule: Schedule, order: int) -> None:
    errors = [transport_error(sampler, schedule, steps) for steps in (40, 80, 160)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.12)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        pytest.param(DDIM(1, eta=1.0), FINE, id="DDIM(1)"),
        pytest.param(DDIM(1, eta=0.5), FINE, id="DDIM(0.5)"),
        pytest.param(FlowSDE(1), RectifiedFlow(), id="FlowSDE"),
    ],
)
def test_stochastic_samplers_keep_the_marginals(sampler: Sampler, schedule: Schedule) -> None:
    """The mean is exact, the variance is correct to first order in the step size."""
    model, errors = GaussianModel(0.5, 0.3, schedule), []
    for steps in (80, 160, 320):
        times = even_times(schedule, steps)
        mean, variance = moments(sampler, model, times)
        true_mean, true_std = model.marginal(times[-1])
        assert mean == pytest.approx(true_mean, abs=1e-12)
        errors.append(abs(variance - true_std**2))
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([1, 1], abs=0.12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_keeps_the_marginals_exactly_if_x0_is_known(eta: float, spacing: Spacing) -> None:
    model = GaussianModel(0.5, 0.0, scaled_linear(final_alpha_cumprod=None, spacing=spacing))
    grid = DDIM(10).grid(model.schedule)
    times = [t for t, _ in grid] + [grid[-1][1]]
    for last in range(2, len(times) + 1):
        mean, variance = moments(DDIM(10, eta=eta), model, times[:last])
        true_mean, true_std = model.marginal(times[last - 1])
        assert mean == pytest.approx(true_mean, abs=1e-12)
        assert variance == pytest.approx(true_std**2, abs=1e-12)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
def test_linear_path_scales_the_gradient_by_13_to_15(spacing: Spacing, offset: int) -> None:
    """The gradient of the first of 50 steps of Stable Diffusion's schedule, without network Jacobians."""
    schedule = scaled_linear(spacing=spacing, steps_offset=offset, final_alpha_cumprod=None)
    x = start = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    for t, s in DDIM(50).grid(schedule):
        x0 = to_x0(torch.zeros_like(x), x, *schedule.coefficients(t), "epsilon")
        x = DDIM(50).step(schedule, x, x0, t, s)[0].mean
    (gradient,) = torch.autograd.grad(x, start)
    assert 13 < gradient.item() < 15


# Transitions.


def normal(transition: Transition) -> Independent:
    return Independent(Normal(transition.mean, transition.std), transition.mean.dim() - 1)


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    one = Transition(torch.randn(3, 2, 4, 4, dtype=torch.float64), 0.3)
    other = Transition(torch.randn(3, 2, 4, 4, dtype=torch.float64), 0.7)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(one.log_prob(x), normal(one).log_prob(x))
    torch.testing.assert_close(one.kl(other), kl_divergence(normal(one), normal(other)))
    torch.testing.assert_close(one.kl(one), torch.zeros(3, dtype=torch.float64))


def test_log_prob_of_half_precision_is_computed_in_float32() -> None:
    mean, x = torch.randn(2, 2, 64, 64, dtype=torch.bfloat16)
    ours = Transition(mean, 0.5).log_prob(x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, Transition(mean.double(), 0.5).log_prob(x.double()).float(), rtol=1e-5, atol=0)


def test_gradient_of_log_prob_equals_the_score_of_the_mean() -> None:
    mean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(Transition(mean, 0.3).log_prob(x).sum(), mean)
    torch.testing.assert_close(gradient, (x - mean.detach()) / 0.3**2)


def test_rsample_is_the_reparameterization() -> None:
    mean, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(Transition(mean, 0.3).rsample(noise), mean + 0.3 * noise)
    assert Transition(mean, 0.0).rsample(noise) is mean
    torch.manual_seed(0)
    drawn = Transition(mean, 0.3).rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, mean + 0.3 * torch.randn_like(mean))


def test_a_deterministic_step_has_no_density() -> None:
    point, cloud = Transition(torch.zeros(1, 2), 0.0), Transition(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=r"DDIM\(eta=1\) or FlowSDE"):
        point.log_prob(torch.zeros(1, 2))
    for one, other in ((point, cloud), (cloud, point)):
        with pytest.raises(ConfigurationError, match="kl of a deterministic step"):
            one.kl(other)


# Invalid settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(0), "num_steps=0 must be at least 1"),
        (lambda: DDIM(10, eta=1.5), "eta=1.5 must be between 0 and 1; write 0 for DDIM or 1 for DDPM"),
        (lambda: DDIM(10, spacing="even"), "leading, trailing, linspace"),
        (lambda: FlowSDE(10, noise_level=-1.0), "noise_level=-1.0 must be at least 0"),
        (lambda: DDIM(10).grid(RectifiedFlow()), "use FlowEuler or FlowSDE"),
        (lambda: DPMSolverPlusPlus(10).grid(RectifiedFlow()), "use FlowEuler or FlowSDE"),
        (lambda: FlowEuler(10).grid(scaled_linear()), "use DDIM or DPMSolverPlusPlus"),
        (lambda: DDIM(1001).grid(scaled_linear()), "exceeds the model's 1000 training timesteps"),
        (lambda: DDIM(1000).grid(scaled_linear(spacing="leading", steps_offset=1)), "spacing to trailing"),
        (lambda: DPMSolverPlusPlus(1000).grid(scaled_linear(spacing="leading")), "spacing to trailing"),
        (lambda: DPMSolverPlusPlus(999).grid(scaled_linear(spacing="leading", steps_offset=1)), "lower num_steps"),
    ],
)
def test_invalid_settings_are_configuration_errors(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
