"""Stochastic samplers of rectified flows against the updates of their authors."""

import math

import pytest
import torch

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.samplers import FlowEuler, FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.stochastic_flow import DanceSDE, FlowCPS
from lightning_draft.testing import GaussianModel


def test_dance_sde_equals_dance_grpo() -> None:
    """The authors write it with the score, `-(x - (1 - t) x_0) / t^2`."""
    schedule, sampler = RectifiedFlow(3.0), DanceSDE(5, noise_level=0.3)
    x, velocity = torch.randn(2, 2, 3, dtype=torch.float64)
    for t, s in sampler.grid(schedule)[:-1]:
        x0 = x - t * velocity
        score = -(x - (1 - t) * x0) / t**2
        mean = x + (s - t) * velocity - 0.5 * 0.3**2 * score * (s - t)
        ours = sampler.step(schedule, x, x0, t, s)[0]
        torch.testing.assert_close(ours.mean, mean)
        assert ours.std == pytest.approx(0.3 * math.sqrt(t - s))


def test_cps_keeps_the_noise_level_of_the_schedule() -> None:
    """The sum of the squares of old and new noise is `s^2`, and the rest is `(1 - s) x_0`."""
    schedule, sampler = RectifiedFlow(3.0), FlowCPS(5, noise_level=0.7)
    x0, eps = torch.randn(2, 2, 3, dtype=torch.float64)
    for t, s in sampler.grid(schedule):
        ours = sampler.step(schedule, (1 - t) * x0 + t * eps, x0, t, s)[0]
        assert ours.std == pytest.approx(s * math.sin(0.35 * math.pi))
        torch.testing.assert_close(ours.mean, (1 - s) * x0 + s * math.cos(0.35 * math.pi) * eps)


def test_cps_with_new_noise_only_is_the_multistep_sampling_of_consistency_models() -> None:
    schedule, sampler = RectifiedFlow(3.0), FlowCPS(5, noise_level=1.0)
    x, x0 = torch.randn(2, 2, 3, dtype=torch.float64)
    for t, s in sampler.grid(schedule):
        ours = sampler.step(schedule, x, x0, t, s)[0]
        torch.testing.assert_close(ours.mean, (1 - s) * x0)
        assert ours.std == s


@pytest.mark.parametrize("sampler", [DanceSDE(5, noise_level=0.0), FlowCPS(5, noise_level=0.0)])
def test_sampler_without_noise_equals_euler(sampler: FlowEuler) -> None:
    schedule, (x, x0) = RectifiedFlow(3.0), torch.randn(2, 2, 3, dtype=torch.float64)
    for t, s in sampler.grid(schedule):
        ours = sampler.step(schedule, x, x0, t, s)[0]
        assert ours.std == 0
        torch.testing.assert_close(ours.mean, FlowEuler(5).step(schedule, x, x0, t, s)[0].mean)


@pytest.mark.parametrize(("sampler", "expected"), [(FlowCPS(40), 0.241), (FlowSDE(40), 0.296), (DanceSDE(40), 0.29)])
def test_standard_deviation_of_samples_of_exact_gaussian_data(sampler: FlowEuler, expected: float) -> None:
    """Of data with 0.3; the docstring of CPS states these figures."""
    model = GaussianModel(mean=0.5, std=0.3, schedule=RectifiedFlow(), shape=(3, 32, 32))
    torch.manual_seed(0)
    chain = SamplingChain(model, sampler, model.encode(["a"] * 4))
    samples = chain.advance(chain.start(torch.randn(4, 3, 32, 32))).x
    assert samples.std().item() == pytest.approx(expected, abs=0.006)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.01)


def test_invalid_noise_levels_are_configuration_errors() -> None:
    with pytest.raises(ConfigurationError, match="noise_level=1.5 must be between 0 and 1"):
        FlowCPS(noise_level=1.5)
    with pytest.raises(ConfigurationError, match="noise_level=-0.1 must be at least 0"):
        DanceSDE(noise_level=-0.1)
