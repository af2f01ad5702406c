"""Inference-time methods against closed forms of linear models, straight-line loops and finite differences."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.guide.best_of_n import best_of_n
from lightning_draft.guide.gradient import gradient_guidance, norm_matched_guidance
from lightning_draft.guide.methods import METHODS, parse_method
from lightning_draft.guide.noise import dno, gaussian_log_probability, norm_log_density, reno
from lightning_draft.models.base import DiffusionModel
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import GaussianModel, LinearModel
from tests.tiny_chain import STEPS, THETA, WEIGHTS, chain_of, noise

TARGET = 0.4
SLOPE = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 4, 4)
WEIGHT = torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, 1, 1)


def quadratic(x0: Tensor) -> Tensor:
    return -0.5 * (x0 - TARGET).square().flatten(1).sum(1)


def linear(x0: Tensor) -> Tensor:
    return (SLOPE * x0).flatten(1).sum(1)


def sample(chain: SamplingChain, start: Tensor) -> Tensor:
    with torch.no_grad():
        return chain.advance(chain.start(start)).x


def chain_for(model: DiffusionModel, sampler: Sampler, batch: int = 2) -> SamplingChain:
    return SamplingChain(model, sampler, model.encode(["a"] * batch))


def flow_chain(sampler: Sampler) -> SamplingChain:
    model = LinearModel(THETA, "flow", RectifiedFlow(), shape=(2, 3))
    return chain_of(model, sampler)


@pytest.mark.parametrize("sampler", [DDIM(5), DDIM(7, eta=1.0), DPMSolverPlusPlus(6)], ids=lambda s: type(s).__name__)
def test_gradient_guidance_samples_the_tilted_distribution_of_gaussian_data(sampler: Sampler) -> None:
    """For data N(m, v) and the reward w x, p(x) exp(s w x) is N(m + s v w, v)."""
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale, model, tilted = 2.0, GaussianModel(0.5, 0.3), GaussianModel(0.5, 0.3)
    tilted.mean = 0.5 + scale * 0.3**2 * SLOPE
    torch.manual_seed(0)
    guided = gradient_guidance(chain_for(model, sampler), start, linear, scale)
    torch.manual_seed(0)
    torch.testing.assert_close(guided, sample(chain_for(tilted, sampler), start), rtol=0, atol=1e-12)


def test_gradient_guidance_of_a_linear_flow_equals_the_loop_by_hand() -> None:
    chain, x, scale = flow_chain(FlowEuler(4)), noise(), 0.7
    guided = gradient_guidance(chain, x, quadratic, scale)
    for t, s in chain.grid:
        slope = 1 - t * THETA * WEIGHT
        x0 = slope * x
        if 1 - t >= 0.05:
            x0 = x0 - scale * t**2 / (1 - t) * slope * (x0 - TARGET)
        x = x + (s - t) / t * (x - x0)
    torch.testing.assert_close(guided, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner", [1, 2])
def test_norm_matched_guidance_of_a_linear_model_equals_the_loop_by_hand(inner: int) -> None:
    chain, x, scale = chain_of(LinearModel(THETA, shape=(2, 3))), noise(), 0.2
    guided = norm_matched_guidance(chain, x, quadratic, scale, inner)
    for t, s in chain.grid:
        (a, b), (a_next, b_next) = (chain.model.schedule.coefficients(u) for u in (t, s))
        for _ in range(inner):
            eps = THETA * WEIGHT * x
            x0 = (x - b * eps) / a
            moved = a_next * x0 + b_next * eps
            g = TARGET - x0
            for i in range(len(x)):
                moved[i] += scale * (x[i] - moved[i]).norm() * g[i] / g[i].norm()
            x = moved
    torch.testing.assert_close(guided, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [gradient_guidance, norm_matched_guidance, reno, dno])
def test_zero_gradient_does_not_change_the_sample(method: Callable[..., Tensor]) -> None:
    chain = chain_of(LinearModel(THETA, shape=(2, 3)))
    options: dict[str, Any] = {"iterations": 2, "regularization": 0.0} if method in (reno, dno) else {}
    found = method(chain, noise(), lambda x0: 0 * x0.flatten(1).sum(1), **options)
    torch.testing.assert_close(found, sample(chain, noise()), rtol=0, atol=0)


@pytest.mark.parametrize(("lr", "max_norm"), [(5.0, 0.1), (0.3, 100.0)])
def test_reno_of_a_linear_model_equals_nesterov_ascent_by_hand(lr: float, max_norm: float) -> None:
    chain, eps, weight = chain_of(LinearModel(THETA, shape=(2, 3))), noise(), 0.05
    found = reno(chain, eps, quadratic, 3, lr, weight, max_norm)
    product = sample(chain, torch.ones_like(eps))
    velocity, best, best_reward = torch.zeros_like(eps), eps, torch.full((4,), -math.inf, dtype=torch.float64)
    for _ in range(4):
        x0 = product * eps
        better = quadratic(x0) > best_reward
        best = torch.where(better.view(-1, 1, 1), x0, best)
        best_reward = torch.where(better, quadratic(x0), best_reward)
        squares = eps.square().sum((1, 2), keepdim=True)
        g = -product * (x0 - TARGET) + weight * ((6 - 1) / squares - 1) * eps
        g = g * (max_norm / (g.square().sum((1, 2), keepdim=True).sqrt() + 1e-6)).clamp(max=1)
        velocity = 0.9 * velocity + g
        eps = eps + lr * (g + 0.9 * velocity)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-10)
    assert (quadratic(found) >= quadratic(sample(chain, noise()))).all()


def test_dno_moves_every_noise_along_the_finite_difference_of_the_reward() -> None:
    """AdamW's first update is `lr sign(g)` after decay by `1 - 0.01 lr`."""
    chain, lr = flow_chain(FlowSDE(3, noise_level=0.5)), 1e-3
    torch.manual_seed(2)
    steps = [torch.randn_like(noise()) for _ in range(2)]
    torch.manual_seed(2)
    found = dno(chain, noise(), quadratic, 1, lr, regularization=0.0)

    def latents(noises: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return [x for _, x in chain.sample_steps(noises[0], [*noises[1:], noises[0]])][-1]

    noises = [noise(), *steps]
    moved = [each.clone() for each in noises]
    for which in range(3):
        for place in range(6):
            up, down = ([each.clone() for each in noises] for _ in range(2))
            up[which].view(4, 6)[:, place] += 1e-5
            down[which].view(4, 6)[:, place] -= 1e-5
            slope = (quadratic(latents(up)) - quadratic(latents(down))) / 2e-5
            column = moved[which].view(4, 6)[:, place]
            column.mul_(1 - 0.01 * lr).add_(lr * slope.sign())
    torch.testing.assert_close(found, latents(moved), rtol=0, atol=1e-7)
    assert (quadratic(found) > quadratic(latents(noises))).all()


def test_log_densities_have_the_gradient_of_finite_differences() -> None:
    def probability(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return gaussian_log_probability(x, permutations=1)

    irregular = torch.linspace(-3, 2, 64, dtype=torch.float64).view(2, 2, 4, 4).requires_grad_()
    assert (probability(irregular) < -1).all()
    assert torch.autograd.gradcheck(probability, (irregular,))
    assert torch.autograd.gradcheck(norm_log_density, (3 * irregular[0],))


def test_norm_log_density_is_that_of_the_chi_distribution() -> None:
    x = torch.tensor([[0.5, 1.0], [3.0, 2.0], [1.5, -2.0]], dtype=torch.float64)
    norms = x.norm(dim=1)
    chi = torch.distributions.Chi2(torch.tensor(2.0, dtype=torch.float64)).log_prob(norms**2) + (2 * norms).log()
    difference = norm_log_density(x) - chi
    torch.testing.assert_close(difference, difference[:1].expand(3))


def test_gaussian_log_probability_equals_the_formula_in_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=generator)
    for noises in (gaussian, 1.3 * gaussian, gaussian + 0.4, gaussian.sort(-1).values):
        flat, m, k = noises.numpy().ravel(), 96, 4
        torch.manual_seed(5)
        orders = [np.arange(384), *(torch.randperm(384).numpy() for _ in range(3))]
        values = []
        for order in orders:
            blocks = flat[order].reshape(m, k)
            mean = np.linalg.norm(blocks.mean(0))
            spread = np.linalg.norm(blocks.T @ blocks / m - np.eye(k), 2)
            first = min(0.0, math.log(2) - m * mean**2 / (2 * k))
            excess = max(0.0, math.sqrt(1 + spread) - 1 - math.sqrt(k / m))
            values.append(first + min(0.0, math.log(2) - m * excess**2 / 2))
        torch.manual_seed(5)
        found = gaussian_log_probability(noises, permutations=3)
        assert found.item() == pytest.approx(values[0] + np.mean(values[1:]), abs=1e-9)
        assert (found.item() == 0) == (noises is gaussian)


def test_best_of_n_returns_the_argmax_of_its_candidates() -> None:
    chain = chain_of(LinearModel(THETA, shape=(2, 3)))
    torch.manual_seed(3)
    starts = torch.stack([noise(), *(torch.randn_like(noise()) for _ in range(4))])
    candidates = torch.stack([sample(chain, start) for start in starts])
    choice = torch.stack([quadratic(each) for each in candidates]).argmax(0)
    assert len(set(choice.tolist())) > 1
    torch.manual_seed(3)
    found = best_of_n(chain, noise(), lambda x0: quadratic(x0).detach(), 5)
    assert torch.equal(found, candidates[choice, torch.arange(4)])
    assert torch.equal(best_of_n(chain, noise(), quadratic, 1), sample(chain, noise()))


@pytest.mark.parametrize(
    ("text", "without", "with_gradient"),
    [
        ("best_of_n:3", 3 * STEPS, 0),
        ("gradient:1", 0, STEPS),
        ("norm_matched:0.1", STEPS, 0),
        ("reno:2", STEPS, 2 * STEPS),
        ("dno:2", STEPS, 2 * STEPS),
    ],
)
def test_network_calls_of_each_method(text: str, without: int, with_gradient: int) -> None:
    model, method = LinearModel(THETA, shape=(2, 3)), parse_method(text)
    method.function(chain_of(model), noise(), quadratic, **method.arguments())
    assert (model.calls_without_gradient, model.calls_with_gradient) == (without, with_gradient)
    assert model.theta.grad is None


def test_every_method_is_tested_for_its_cost() -> None:
    (mark,) = [m for m in test_network_calls_of_each_method.pytestmark if m.name == "parametrize"]
    assert {text.partition(":")[0] for text, *_ in mark.args[1]} == set(METHODS)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_gradient])
def test_samples_of_a_batch_do_not_depend_on_each_other(name: str) -> None:
    method, model = METHODS[name], LinearModel(THETA, shape=(2, 3))
    torch.manual_seed(0)
    both = method.function(chain_for(model, DDIM(3)), noise(2), quadratic, **method.arguments())
    torch.manual_seed(0)
    one = method.function(chain_for(model, DDIM(3), 1), noise(2)[:1], quadratic, **method.arguments())
    torch.testing.assert_close(both[:1], one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gradint", "did you mean gradient"),
        ("reno:1.5", "iterations of reno must be an integer of at least 1; write reno:10"),
        ("gradient:x", "must be a number; write gradient:1"),
        ("best_of_n:0", "must be an integer of at least 1"),
        ("norm_matched:nan", "must be a number"),
    ],
)
def test_invalid_method_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_method(text)
