"""Surrogate trajectories against hand computation: with `f = theta w x` every gradient is a short product."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_draft.surrogates as module
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, FlowEuler, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.surrogates import (
    DirectAlign,
    FlowBPBridge,
    FlowBPLagrange,
    LeapAlign,
    evenly_spaced,
    lagrange_weights,
)
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import DRTune, Truncation

STEPS, THETA = 6, 0.3
VARIANTS: list[Truncation] = [
    FlowBPBridge(k=3),
    LeapAlign(),
    FlowBPLagrange(),
    DirectAlign(),
    DirectAlign(2, inversion=True),
]
battery = pytest.mark.parametrize("truncation", VARIANTS, ids=lambda t: type(t).__name__)


def test_the_parametrized_tests_cover_every_variant() -> None:
    members = inspect.getmembers(module, inspect.isclass)
    shipped = {
        member for _, member in members if issubclass(member, Truncation) and member.__module__ == module.__name__
    }
    assert {type(truncation) for truncation in VARIANTS} == shipped


def flow() -> LinearModel:
    return LinearModel(THETA, "flow", RectifiedFlow(), (2, 3))


def chain_of(model: LinearModel, seed: int, sampler: Sampler | None = None, **options: Any) -> SamplingChain:
    generator = torch.Generator().manual_seed(seed)
    return SamplingChain(model, sampler or FlowEuler(STEPS), model.encode(["a", "b"]), generator=generator, **options)


def noise() -> Tensor:
    return torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradient(latents: Tensor, model: LinearModel) -> float:
    (found,) = torch.autograd.grad(latents.sum(), model.theta)
    return found.item()


def trajectory(chain: SamplingChain) -> list[Tensor]:
    """Euler's method by hand: `x_{i+1} = (1 + (s - t) theta) x_i`."""
    latents = [noise()]
    for t, s in chain.grid:
        latents.append((1 + (s - t) * THETA) * latents[-1])
    return latents


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bridge", [0.0, 0.5, 1.0])
def test_flow_bp_bridge_gradient_equals_hand_computation(seed: int, bridge: float) -> None:
    model = flow()
    truncation = FlowBPBridge(k=3, late_bias=1.0, rescale=0.5, bridge=bridge)
    choices, chain = chain_of(flow(), seed), chain_of(model, seed)
    trained = sorted(choices.choose([i + 1.0 for i in range(STEPS)], 3))
    j = trained[choices.randint(1, 2)]
    latents = truncation(chain, noise())
    x = trajectory(chain)
    torch.testing.assert_close(latents, x[-1])
    assert (model.calls_with_gradient, model.calls_without_gradient) == (3, STEPS - 3)
    dt = [s - t for t, s in chain.grid]
    gain = 1 + 0.5 * (sum(dt) / sum(dt[i] for i in trained) - 1)
    expected = sum(
        gain * dt[i] * x[i].sum().item() * (1 + bridge * gain * dt[j] * THETA if i < j else 1.0) for i in trained
    )
    assert gradient(latents, model) == pytest.approx(expected, rel=1e-12)
    if bridge == 0:
        sparse = DRTune(3, m=0, late_bias=1.0, rescale=0.5)
        assert gradient(sparse(chain_of(model, seed), noise()), model) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("min_distance", [1e-6, 0.1, 1e9])
def test_leap_align_gradient_equals_hand_computation(seed: int, discount: float, min_distance: float) -> None:
    model = flow()
    chain = chain_of(model, seed)
    k, j = chain_of(flow(), seed).choose([1.0] * STEPS, 2)
    latents = LeapAlign(discount, min_distance)(chain, noise())
    x, (tk, tj) = trajectory(chain), (chain.grid[k][0], chain.grid[j][0])
    torch.testing.assert_close(latents, x[-1])
    assert (model.calls_with_gradient, model.calls_without_gradient) == (2, STEPS)
    to_j, to_end = (1 + (tj - tk) * THETA) * x[k], (1 - tj * THETA) * x[j]
    distances = [(a - b).abs().mean((1, 2)).clamp(min=min_distance) for a, b in ((to_j, x[j]), (to_end, x[-1]))]
    first = (tj - tk) * x[k]  # d y_j / d theta
    slopes = -tj * x[j] + first * (1 - discount * tj * THETA)
    expected = (slopes.sum((1, 2)) / sum(distances)).sum().item()
    assert gradient(latents, model) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("order", "second"), [(1, 0.5), (3, 0.0), (3, 0.25), (9, 1.0)])
@pytest.mark.parametrize("min_distance", [1e-9, 0.2])
def test_flow_bp_lagrange_gradient_equals_hand_computation(
    seed: int, order: int, second: float, min_distance: float
) -> None:
    model, discount = flow(), 0.4
    chain = chain_of(model, seed)
    k, j = chain_of(flow(), seed).choose([1.0] * STEPS, 2)
    latents = FlowBPLagrange(order, discount, second, min_distance)(chain, noise())
    x, times = trajectory(chain), [*(t for t, _ in chain.grid), 0.0]
    torch.testing.assert_close(latents, x[-1])

    def jump(a: int, b: int) -> tuple[Tensor, Tensor, float, int]:
        """Return the estimate, its derivative with respect to `theta`, the first weight, and the number of calls."""
        steps = evenly_spaced(a, b, order)
        powers = np.vander([times[i] for i in steps], increasing=True).T
        moments = [(times[b] ** (n + 1) - times[a] ** (n + 1)) / (n + 1) for n in range(len(steps))]
        w = np.linalg.solve(powers, moments)
        slope = w[0] * x[a] + (second * w[1] * x[steps[1]] if len(steps) > 1 else 0)
        return x[a] + sum(w[i] * THETA * x[s] for i, s in enumerate(steps)), slope, w[0], 1 + (len(steps) > 1)

    (to_j, slope, _, calls), (to_end, own, first, more) = jump(k, j), jump(j, STEPS)
    assert (model.calls_with_gradient, model.calls_without_gradient) == (calls + more if second else 2, STEPS)
    distances = [(a - b).abs().mean((1, 2)).clamp(min=min_distance) for a, b in ((to_j, x[j]), (to_end, x[-1]))]
    slopes = own + slope * (1 + first * discount * THETA)
    assert gradient(latents, model) == pytest.approx((slopes.sum((1, 2)) / sum(distances)).sum().item(), rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_flow_bp_lagrange_with_ddim_equals_a_straight_line_implementation_on_its_flow(seed: int) -> None:
    """DDIM is Euler's method for `y = x / (alpha + sigma)` over the time `sigma / (alpha + sigma)`."""
    model, oracle = LinearModel(THETA, shape=(2, 3)), LinearModel(THETA, shape=(2, 3))
    chain, grid = chain_of(model, seed, DDIM(STEPS)), DDIM(STEPS).grid(model.schedule)
    k, j = chain_of(flow(), seed).choose([1.0] * STEPS, 2)
    latents = FlowBPLagrange(2, discount=0.5, second=0.5, min_distance=1e9)(chain, noise())
    starts, ends = ([model.schedule.coefficients(t) for t in times] for times in zip(*grid, strict=True))
    u, u_next = ([sigma / (alpha + sigma) for alpha, sigma in pairs] for pairs in (starts, ends))

    def velocity(x: Tensor, i: int, discount: float = 1.0) -> Tensor:
        """Discount the gradient of the network's input, and not that of the conversion to the velocity."""
        (alpha, sigma), eps = starts[i], oracle.theta * (x.detach() + discount * (x - x.detach()))
        return eps - (x - sigma * eps) / alpha

    def move(x: Tensor, i: int, end: int, change: Tensor) -> Tensor:
        """Add a change of `y` to the latent of step `i`, which ends at the end of step `end - 1`."""
        return (x / sum(starts[i]) + change) * sum(ends[end - 1])

    x = [noise()]
    for i in range(STEPS):
        x.append(move(x[-1], i, i + 1, (u_next[i] - u[i]) * velocity(x[-1], i)).detach())
    torch.testing.assert_close(latents, x[-1])

    def jump(start: Tensor, a: int, b: int) -> Tensor:
        """Integrate the line through the first and the last velocity of the interval."""
        v, last, width = velocity(start, a, 0.5), b - 1, u_next[b - 1] - u[a]
        if last == a:
            return move(start, a, b, width * v)
        other = velocity(x[last], last)
        other = other.detach() + 0.5 * (other - other.detach())
        return move(start, a, b, width * v + (other - v) / (u[last] - u[a]) * width**2 / 2)

    to_j = jump(x[k], k, j)
    to_end = jump(x[j] + to_j - to_j.detach(), j, STEPS)
    assert gradient(latents, model) == pytest.approx(gradient(to_end / 2e9, oracle), rel=1e-10)


def test_supports_of_an_interval_are_evenly_spaced_and_include_its_first_step() -> None:
    assert evenly_spaced(2, 9, 3) == [2, 5, 8]
    assert evenly_spaced(2, 9, 1) == [2]
    assert evenly_spaced(2, 4, 3) == [2, 3]
    assert evenly_spaced(4, 5, 3) == [4]
    assert evenly_spaced(0, 25, 4) == [0, 8, 16, 24]


def test_lagrange_weights_integrate_polynomials_exactly() -> None:
    points = [1.0, 0.7, 0.45, 0.1]
    weights = lagrange_weights(points, 1.0, 0.0)
    for power in range(4):
        found = sum(weight * point**power for weight, point in zip(weights, points, strict=True))
        assert found == pytest.approx(-1 / (power + 1), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_direct_align_gradient_equals_hand_computation(seed: int) -> None:
    model = flow()
    chain = chain_of(model, seed)
    left = chain_of(flow(), seed).randint(1, STEPS - 1)
    latents = DirectAlign()(chain, noise())
    assert (model.calls_with_gradient, model.calls_without_gradient) == (1, STEPS)
    t, s = chain.grid[STEPS - left]
    x_t = (1 - t) * trajectory(chain)[-1] + t * noise()
    torch.testing.assert_close(latents, (x_t + (s - t) * THETA * x_t - s * noise()) / (1 - s))
    assert gradient(latents, model) == pytest.approx(((s - t) * x_t / (1 - s)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_flow", [True, False], ids=["flow", "DDIM"])
def test_inversion_of_direct_align_equals_hand_computation(seed: int, is_flow: bool) -> None:
    """The reward of the copy that takes the step up is decreased."""
    model = flow() if is_flow else LinearModel(THETA, shape=(2, 3))
    chain = chain_of(model, seed, None if is_flow else DDIM(STEPS))
    left = chain_of(flow(), seed).randint(2, STEPS - 1)
    plain = DirectAlign(low=2)(chain_of(model, seed, chain.sampler), noise())
    calls = model.calls_with_gradient
    latents = DirectAlign(low=2, inversion=True)(chain, noise())
    assert model.calls_with_gradient == calls + 2
    assert torch.equal(latents[:2], plain)
    with torch.no_grad():
        sample = chain.advance(chain.start(noise())).x
    (t, _), (s, _) = chain.grid[STEPS - left : STEPS - left + 2]
    (a_t, s_t), (a_s, s_s) = model.schedule.coefficients(t), model.schedule.coefficients(s)
    x_s, e = a_s * sample + s_s * noise(), noise()
    eps, slope = (THETA * x_s, x_s) if not is_flow else (x_s + (1 - s) * THETA * x_s, (1 - s) * x_s)
    x_t = a_t * (x_s - s_s * eps) / a_s + s_t * eps
    torch.testing.assert_close(latents[2:], (x_t - s_t * e) / a_t)
    expected = -((s_t / a_t - s_s / a_s) * slope).sum().item()
    assert gradient(latents, model) == pytest.approx(gradient(plain, model) + expected, rel=1e-10)
    if is_flow:
        torch.testing.assert_close(x_t, x_s + (t - s) * THETA * x_s)


@battery
@pytest.mark.parametrize("recompute", [Recompute(steps=True), Recompute(micro_batch_size=1)], ids=["steps", "slices"])
def test_recomputation_changes_no_gradient(truncation: Truncation, recompute: Recompute) -> None:
    for sampler, model in ((FlowEuler(STEPS), flow()), (DDIM(STEPS), LinearModel(THETA, shape=(2, 3)))):
        plain = truncation(chain_of(model, 1, sampler), noise())
        again = truncation(chain_of(model, 1, sampler, recompute=recompute), noise())
        torch.testing.assert_close(again, plain, rtol=1e-13, atol=0)
        assert gradient(again, model) == pytest.approx(gradient(plain, model), rel=1e-12)


@battery
def test_gradient_steps_bounds_the_calls_with_gradient(truncation: Truncation) -> None:
    found = []
    for seed in range(20):
        model = flow()
        truncation(chain_of(model, seed), noise())
        found.append(model.calls_with_gradient)
    assert max(found) == truncation.gradient_steps(STEPS)
    assert isinstance(truncation, FlowBPLagrange) or min(found) == max(found)


@battery
def test_random_choices_do_not_use_the_global_generator(truncation: Truncation) -> None:
    before = torch.get_rng_state()
    truncation(chain_of(flow(), 0), noise())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowBPBridge(k=1), "k=1 must be at least 2"),
        (lambda: FlowBPBridge(bridge=2.0), "bridge=2.0 must be between 0 and 1"),
        (lambda: FlowBPBridge(k=7)(chain_of(flow(), 0), noise()), "k=7 exceeds the sampler's num_steps=6"),
        (lambda: LeapAlign(discount=-1.0), "discount=-1.0 must be between 0 and 1"),
        (lambda: LeapAlign(min_distance=0.0), "min_distance=0.0 must be a positive number"),
        (lambda: LeapAlign()(chain_of(flow(), 0, FlowEuler(1)), noise()), "LeapAlign needs at least 2 sampling steps"),
        (lambda: FlowBPLagrange(order=0), "order=0 must be at least 1"),
        (lambda: FlowBPLagrange(second=2.0), "second=2.0 must be between 0 and 1"),
        (
            lambda: DirectAlign(inversion=True),
            "low=1 must be at least 2; write 2 or more, because inversion steps up from the next step",
        ),
        (lambda: DirectAlign(low=0), "low=0 must be at least 1"),
        (lambda: DirectAlign(low=3, high=2), "high=2 must be at least 3; write 3 or more, because low is 3"),
        (lambda: DirectAlign(high=9)(chain_of(flow(), 0), noise()), "high=9 must be in this order between 1 and"),
        (
            lambda: DirectAlign(2, 6, inversion=True)(chain_of(flow(), 0), noise()),
            "low=2 and high=6 must be in this order between 2 and the sampler's num_steps=6 less 1",
        ),
    ],
)
def test_invalid_settings_are_configuration_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
