"""Gradients of truncations, and of the prediction drift, against gradients computed by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import PredictionDrift, SamplingChain
from lightning_draft.models.base import Prediction
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
from tests.truncation_by_hand import (
    BATCH,
    GRIDS,
    PREDICTIONS,
    STEPS,
    THETA,
    chain_of,
    gradient,
    linear,
    noise,
    sample_steps,
)


@PREDICTIONS
@GRIDS
@pytest.mark.parametrize("k", range(1, STEPS + 1))
def test_last_k_gradient_equals_hand_computation(prediction: Prediction, grid: dict[str, Any], k: int) -> None:
    model = linear(prediction, **grid)
    chain = chain_of(model)
    latents = LastK(k)(chain, noise())
    oracle = sample_steps(chain, noise())
    torch.testing.assert_close(latents, oracle.x[-1])
    assert gradient(latents, model) == pytest.approx(oracle.sum(set(range(STEPS - k, STEPS))), rel=1e-12)


@PREDICTIONS
@GRIDS
def test_full_equals_last_k_of_all_steps_and_the_closed_form(prediction: Prediction, grid: dict[str, Any]) -> None:
    model = linear(prediction, **grid)
    chain = chain_of(model)
    ours = gradient(Full()(chain, noise()), model)
    assert ours == gradient(LastK(STEPS)(chain, noise()), model)
    w = sample_steps(chain, noise())
    closed = sum(b * w.weight / (a + b * THETA * w.weight) for a, b in zip(w.a, w.b, strict=True)) * w.x[-1]
    assert ours == pytest.approx(closed.sum().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("model", "sampler"),
    [
        (linear(), DDIM(STEPS)),
        (linear("v_prediction"), DDIM(STEPS, eta=1.0)),
        (linear(), DPMSolverPlusPlus(STEPS)),
        (LinearModel(THETA, "flow", RectifiedFlow(3.0), (2, 3)), FlowEuler(STEPS)),
        (LinearModel(THETA, "flow", RectifiedFlow(), (2, 3)), FlowSDE(STEPS)),
    ],
    ids=["DDIM", "DDIM(1)", "DPMSolverPlusPlus", "FlowEuler", "FlowSDE"],
)
def test_full_gradient_equals_finite_differences(model: LinearModel, sampler: Sampler) -> None:
    def value(theta: float) -> Tensor:
        with torch.no_grad():
            model.theta.fill_(theta)
        torch.manual_seed(0)
        return Full()(chain_of(model, sampler), noise()).sum()

    h = 1e-5
    difference = (value(THETA + h) - value(THETA - h)).item() / (2 * h)
    (ours,) = torch.autograd.grad(value(THETA), model.theta)
    assert ours.item() == pytest.approx(difference, rel=1e-8)


@pytest.mark.parametrize("final", [1.0, None])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_low_variance_gradient_equals_hand_computation(copies: int, final: float | None) -> None:
    """The last step of the sample, and one step of each copy, which is renoised from the detached sample."""
    model = linear(final_alpha_cumprod=final)
    chain = chain_of(model)
    torch.manual_seed(7)
    latents = LowVariance(copies)(chain, noise())
    oracle = sample_steps(chain, noise())
    torch.testing.assert_close(latents[:BATCH], oracle.x[-1])
    expected = oracle.sum({STEPS - 1})
    torch.manual_seed(7)
    eps = torch.randn(copies * BATCH, 2, 3, dtype=torch.float64).split(BATCH)
    alpha, sigma = model.schedule.coefficients(chain.grid[-1][0])
    a, b = oracle.a[-1], oracle.b[-1]
    for copy in range(copies):
        renoised = alpha * oracle.x[-1] + sigma * eps[copy]
        rows = latents[(copy + 1) * BATCH : (copy + 2) * BATCH]
        torch.testing.assert_close(rows, (a + b * THETA * oracle.weight) * renoised)
        if final == 1.0:  # then the step is the prediction of x_0, and the oracle is -(s/a)(a x_0 + s e)
            assert b == pytest.approx(-sigma / alpha)
        expected += (b * oracle.weight * renoised).sum().item()
    assert gradient(latents, model) == pytest.approx(expected, rel=1e-12)


@PREDICTIONS
@pytest.mark.parametrize("seed", range(6))
def test_refl_gradient_equals_hand_computation(prediction: Prediction, seed: int) -> None:
    model = linear(prediction)
    left = chain_of(model, seed=seed).randint(1, 4)
    chain = chain_of(model, seed=seed)
    latents = ReFL(m=4)(chain, noise())
    oracle = sample_steps(chain, noise(), stop=STEPS - left)
    torch.testing.assert_close(latents, oracle.x[-1])
    assert gradient(latents, model) == pytest.approx(oracle.sum({STEPS - left}), rel=1e-12)


def test_refl_at_the_last_step_equals_draft_1_only_if_the_final_alpha_is_1() -> None:
    for final, equal in ((1.0, True), (None, False)):
        model = linear(final_alpha_cumprod=final)
        refl = gradient(ReFL(m=1)(chain_of(model), noise()), model)
        assert (refl == pytest.approx(gradient(LastK(1)(chain_of(model), noise()), model))) == equal


@pytest.mark.parametrize("seed", range(6))
def test_random_k_gradient_equals_hand_computation(seed: int) -> None:
    model = linear()
    k = chain_of(model, seed=seed).randint(1, STEPS)
    ours = gradient(RandomK()(chain_of(model, seed=seed), noise()), model)
    assert ours == gradient(LastK(k)(chain_of(model), noise()), model)


@PREDICTIONS
@pytest.mark.parametrize("seed", range(8))
def test_random_steps_gradient_equals_hand_computation(prediction: Prediction, seed: int) -> None:
    model = linear(prediction)
    choices = chain_of(model, seed=seed)
    chosen = {i for i in range(STEPS) if choices.rand() < (i + 1) / (STEPS + 1)} or {STEPS - 1}
    chain = chain_of(model, seed=seed)
    latents = RandomSteps()(chain, noise())
    oracle = sample_steps(chain, noise())
    torch.testing.assert_close(latents, oracle.x[-1])
    assert gradient(latents, model) == pytest.approx(oracle.sum(chosen), rel=1e-12)


@PREDICTIONS
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 3), (3, 5), (4, 2), (5, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_drtune_gradient_equals_hand_computation(prediction: Prediction, k: int, m: int, seed: int) -> None:
    model = linear(prediction)
    choices = chain_of(model, seed=seed)
    stop = STEPS - choices.randint(1, m)
    trained = DRTune(k, m).trained_steps(choices, stop + 1)
    chain = chain_of(model, seed=seed)
    latents = DRTune(k, m)(chain, noise())
    oracle = sample_steps(chain, noise(), stop=stop)
    torch.testing.assert_close(latents, oracle.x[-1])
    assert gradient(latents, model) == pytest.approx(oracle.sum(trained, attached=False), rel=1e-12)


@PREDICTIONS
@pytest.mark.parametrize(("k", "rho"), [(1, 1.0), (3, 0.5), (5, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_flow_bp_sparse_gradient_equals_hand_computation(prediction: Prediction, k: int, rho: float, seed: int) -> None:
    """The value is the sample; the gradient is rescaled by the ratio of all to the trained timesteps, up to `rho`."""
    model = linear(prediction)
    truncation = DRTune(k, m=0, late_bias=1.0, rescale=rho)
    weights = torch.arange(1, STEPS + 1, dtype=torch.float64)
    chosen = torch.multinomial(weights, k, generator=torch.Generator().manual_seed(seed)).tolist()
    chain = chain_of(model, seed=seed)
    latents = truncation(chain, noise())
    oracle = sample_steps(chain, noise())
    torch.testing.assert_close(latents, oracle.x[-1])
    assert model.calls_with_gradient == k
    expected = (1 + rho * (STEPS / k - 1)) * oracle.sum(set(chosen), attached=False)  # DDIM's timesteps are even
    assert gradient(latents, model) == pytest.approx(expected, rel=1e-12)


def test_flow_bp_sparse_rescales_by_time_not_steps() -> None:
    model = LinearModel(THETA, "flow", RectifiedFlow(3.0), (2, 3))
    truncation = DRTune(k=2, m=0, late_bias=0.0, rescale=1.0)
    chain = chain_of(model, FlowEuler(STEPS))
    (found,) = torch.autograd.grad(truncation(chain, noise()).sum(), model.theta)
    chosen = torch.multinomial(torch.ones(STEPS).double(), 2, generator=torch.Generator().manual_seed(0)).tolist()
    weight = torch.tensor([1.0, 0.5, -1.0, 2.0]).double().view(-1, 1, 1)
    x, total, span = noise(), torch.zeros(()), 0.0
    for i, (t, s) in enumerate(chain.grid):
        if i in chosen:
            total, span = total + ((s - t) * weight * x).sum(), span + t - s
        x = x + (s - t) * THETA * weight * x
    assert found.item() == pytest.approx(total.item() * chain.grid[0][0] / span)


# DRaFT+.


@pytest.mark.parametrize("truncation", [LastK(1), LastK(3), Full(), DRTune(k=5, m=1)], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_drift_equals_hand_computation(truncation: Truncation, prediction: Prediction) -> None:
    """`mean (eps_theta - eps_base)^2`, with `eps_base` a constant and `eps_theta` attached to its input."""
    model = linear(prediction)
    shift, moved = 0.05, THETA + 0.05
    with torch.no_grad():
        model.theta.fill_(moved)
    drift = PredictionDrift()
    chain = chain_of(model, drift=drift)
    truncation(chain, noise())
    assert drift.mean is not None
    (ours,) = torch.autograd.grad(drift.mean, model.theta)

    theta = torch.tensor(moved, dtype=torch.float64, requires_grad=True)
    steps = truncation.gradient_steps(STEPS)
    weight = chain.conditioning.tensors["weight"].view(-1, 1, 1)
    oracle = sample_steps(chain, noise())
    x, terms = noise(), []
    for i, (t, _) in enumerate(chain.grid):
        x = x.detach() if i <= STEPS - steps else x
        seen = x.detach() if isinstance(truncation, DRTune) else x
        scale = 1.0 if prediction == "epsilon" else model.schedule.coefficients(t)[0]  # d eps / d v = a
        if i >= STEPS - steps:
            terms.append((scale * weight * (theta * seen - THETA * seen.detach())).square().mean())
        x = oracle.a[i] * x + oracle.b[i] * weight * theta * seen
    expected = torch.stack(terms).mean()
    assert drift.mean.item() == pytest.approx(expected.item(), rel=1e-10)
    (by_hand,) = torch.autograd.grad(expected, theta)
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-10)
    if truncation.gradient_steps(STEPS) == 1:
        x = walk_to_last(chain, moved)
        scale = 1.0 if prediction == "epsilon" else model.schedule.coefficients(chain.grid[-1][0])[0]
        assert expected.item() == pytest.approx((scale * shift * weight * x).square().mean().item())


def walk_to_last(chain: SamplingChain, theta: float) -> Tensor:
    """The latent before the last step, under `theta`."""
    oracle = sample_steps(chain, noise())
    x = noise()
    for a, b in list(zip(oracle.a, oracle.b, strict=True))[:-1]:
        x = (a + b * theta * oracle.weight) * x
    return x


def test_drift_is_zero_before_training() -> None:
    model = linear()
    drift = PredictionDrift()
    Full()(chain_of(model, drift=drift), noise())
    assert drift.mean is not None
    assert drift.mean.item() == 0
    assert torch.autograd.grad(drift.mean, model.theta)[0].item() == 0
