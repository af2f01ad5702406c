"""The sampling chain: positions, renoised copies, leaps, and where graphs start."""

import pytest
import torch

from lightning_draft.chain import PredictionDrift, SamplingChain, State
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Prediction
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import GaussianModel, LinearModel
from tests.tiny_chain import STEPS, THETA, WEIGHTS, Spy, chain_of, noise

# Positions.


@pytest.mark.parametrize("sampler", [DDIM(STEPS), DPMSolverPlusPlus(STEPS)], ids=["DDIM", "2M"])
@pytest.mark.parametrize("pieces", [(2, 0, 1, None), (1, 1, 1, 1, 1), (4, 1)])
def test_advancing_in_parts_equals_advancing_at_once(sampler: Sampler, pieces: tuple[int | None, ...]) -> None:
    """Compared with one loop over the sampler; the state of a multistep solver must be passed from call to call."""
    model = LinearModel(THETA, shape=(2, 3))
    chain = chain_of(model, sampler)
    x, solver_state = noise(), None
    for t, s in chain.grid:
        x0 = model.denoise(x, t, chain.conditioning)
        transition, solver_state = sampler.step(model.schedule, x, x0, t, s, solver_state)
        x = transition.mean
    state = chain.start(noise())
    for steps in pieces:
        state = chain.advance(state, steps)
    assert state.step == chain.num_steps == STEPS
    assert torch.equal(state.x, x)
    assert torch.equal(chain.advance(chain.start(noise())).x, x)


def test_sampling_does_not_change_the_chain() -> None:
    chain = chain_of(LinearModel(THETA, shape=(2, 3)))
    state = chain.advance(chain.start(noise()), 2)
    before = state.x.clone()
    assert torch.equal(chain.advance(state).x, chain.advance(state).x)
    assert torch.equal(state.x, before)
    with pytest.raises(AttributeError):
        state.step = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        chain.sampler = DDIM(3)  # type: ignore[misc]


@pytest.mark.parametrize("steps", [-1, 4])
def test_more_steps_than_remain_are_rejected(steps: int) -> None:
    chain = chain_of(LinearModel(shape=(2, 3)))
    with pytest.raises(ValueError, match=f"cannot advance {steps} steps: 3 of 5 remain"):
        chain.advance(State(noise(), 2), steps)


def test_invalid_sizes_are_rejected() -> None:
    with pytest.raises(ConfigurationError, match="micro_batch_size=0 must be at least 1; write 1 or more, or null"):
        Recompute(micro_batch_size=0)
    with pytest.raises(ValueError, match=r"steps_left=6 must be between 1 and 5"):
        chain_of(LinearModel()).renoise(noise(), 6)
    with pytest.raises(ValueError, match="needs a rectified-flow model"):
        chain_of(LinearModel(), FlowEuler(4))


def test_step_equals_predict_and_transition() -> None:
    model = LinearModel(THETA, shape=(2, 3))
    chain = chain_of(model, DDIM(STEPS, eta=1.0))
    state = chain.advance(chain.start(noise()), 2)
    t, s = chain.grid[2]
    alpha, sigma = model.schedule.coefficients(t)
    weight = torch.tensor(WEIGHTS).double().view(-1, 1, 1)
    x0 = (state.x - sigma * THETA * weight * state.x) / alpha
    torch.testing.assert_close(chain.predict(state), x0)
    expected, _ = chain.sampler.step(model.schedule, state.x, x0, t, s)
    transition = chain.transition(state)
    torch.testing.assert_close(transition.mean, expected.mean)
    assert transition.std == expected.std > 0
    torch.manual_seed(0)
    moved = chain.advance(state, 1).x
    torch.manual_seed(0)
    torch.testing.assert_close(moved, transition.mean + transition.std * torch.randn_like(moved))


def test_random_choices_use_the_generator_and_cover_their_range() -> None:
    def choices(seed: int) -> list[float]:
        chain = chain_of(LinearModel(), generator=torch.Generator().manual_seed(seed))
        return [chain.randint(2, 4) if i % 2 else chain.rand() for i in range(60)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = choices(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == choices(1) != choices(2)
    assert set(first[1::2]) == {2, 3, 4}
    assert all(0 <= number < 1 for number in first[::2])


# Renoising and copies.


@pytest.mark.parametrize("left", [1, 3, STEPS])
def test_renoise_equals_the_forward_process(left: int) -> None:
    chain = chain_of(LinearModel(shape=(2, 3)))
    x0, eps = noise(), torch.randn(4, 2, 3, dtype=torch.float64)
    state = chain.renoise(x0, left, eps)
    abar = chain.model.schedule.alphas_cumprod[int(chain.grid[STEPS - left][0])]  # type: ignore[attr-defined]
    assert (state.step, state.solver_state) == (STEPS - left, None)
    torch.testing.assert_close(state.x, abar**0.5 * x0 + (1 - abar) ** 0.5 * eps)
    torch.manual_seed(1)
    renoised = chain.renoise(x0, left).x
    torch.manual_seed(1)
    assert torch.equal(renoised, chain.renoise(x0, left, torch.randn_like(x0)).x)


def test_renoised_data_has_the_marginal_of_its_step() -> None:
    """For an exact Gaussian: a copy of DRaFT-LV has the distribution of the latents of the chain."""
    model = GaussianModel(0.5, 0.3, shape=(40_000,))
    chain = SamplingChain(model, DDIM(STEPS), model.encode(["a"]))
    torch.manual_seed(0)
    state = chain.renoise(0.5 + 0.3 * torch.randn(1, 40_000, dtype=torch.float64), 2)
    mean, std = model.marginal(chain.grid[STEPS - 2][0])
    assert state.x.mean().item() == pytest.approx(mean, abs=5 * std / 200)
    assert state.x.std().item() == pytest.approx(std, rel=5 / 280)


def test_copies_follow_each_other_and_share_drift_and_probes() -> None:
    seen: list[int] = []
    model, drift = Spy(), PredictionDrift()
    chain = chain_of(model, drift=drift, probes=(lambda step, latent: seen.append(len(latent)),))
    chain.advance(chain.start(noise()), 1)
    copies = chain.repeat(3)
    x = torch.cat([noise()] * 3)
    moved = copies.advance(copies.start(x), 1).x.split(4)
    assert model.weights[-2:] == [list(WEIGHTS) * 3] * 2  # the model and its base
    assert torch.equal(moved[0], moved[2])
    assert torch.equal(moved[0], chain.advance(chain.start(noise()), 1).x)
    assert seen == [4, 12, 4]
    assert copies.drift is drift
    assert copies.recompute is chain.recompute
    assert len(chain.conditioning) == 4


# Where the graph begins.


def test_steps_without_gradient_build_no_graph() -> None:
    """No input, output or latent of these steps requires a gradient; the graph contains only the step after them."""
    model = Spy()
    chain = chain_of(model)
    with torch.no_grad():
        state = chain.advance(chain.start(noise()), STEPS - 1)
    assert model.calls == [(4, False, False)] * (STEPS - 1)
    assert state.x.grad_fn is None
    assert not state.x.requires_grad
    end = chain.advance(state).x
    assert model.calls[-1] == (4, False, True)
    nodes, todo = set(), [end.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    leaves = {node.variable for node in nodes if hasattr(node, "variable")}  # type: ignore[union-attr]
    assert leaves == {model.theta}
    assert len(nodes) < 20


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gains_scale_the_gradient_through_the_network(prediction: Prediction, checkpointed: bool) -> None:
    """`d x_1 = A d x_0 + output_gain B (w x_0 d theta + input_gain theta w d x_0)`; 0 builds no graph there."""
    for gains, call in (
        ((1.0, 1.0), (4, True, True)),
        ((0.0, 1.0), (4, False, True)),
        ((1.0, 0.0), (4, True, False)),
        ((0.3, 1.0), (4, True, True)),
        ((1.0, 2.5), (4, True, True)),
        ((0.5, 0.25), (4, True, True)),
    ):
        model = Spy(prediction)
        chain = chain_of(model, recompute=Recompute(steps=checkpointed))
        start = noise().requires_grad_()
        into, out = gains
        x = chain.advance(chain.start(start), 1, input_gain=into, output_gain=out).x
        assert model.calls[0] == call
        assert torch.equal(x, chain.advance(chain.start(start), 1).x)
        slope, theta = torch.autograd.grad(x.sum(), (start, model.theta), allow_unused=True)
        t, s = chain.grid[0]
        (alpha, sigma), (alpha_s, sigma_s) = model.schedule.coefficients(t), model.schedule.coefficients(s)
        if prediction == "epsilon":
            a, b = alpha_s / alpha, sigma_s - alpha_s * sigma / alpha
        else:
            a, b = alpha_s * alpha + sigma_s * sigma, sigma_s * alpha - alpha_s * sigma
        weight = torch.tensor(WEIGHTS).double().view(-1, 1, 1)
        torch.testing.assert_close(slope, (a + out * into * b * THETA * weight).expand_as(slope))
        if out == 0:
            assert theta is None
        else:
            assert theta.item() == pytest.approx(out * (b * weight * start).sum().item())


def test_gains_act_on_predictions_and_transitions_alike() -> None:
    model = LinearModel(THETA, shape=(2, 3))
    chain = chain_of(model, DDIM(STEPS, eta=1.0))
    state = chain.advance(chain.start(noise()), 2)
    state = State(state.x.detach(), state.step)
    for value in (chain.predict, lambda state, **gains: chain.transition(state, **gains).mean):
        (whole,) = torch.autograd.grad(value(state).sum(), model.theta)
        (half,) = torch.autograd.grad(value(state, output_gain=0.5).sum(), model.theta)
        assert half.item() == pytest.approx(0.5 * whole.item())
        assert not value(state, output_gain=0.0).requires_grad


# Leaps.


@pytest.mark.parametrize(
    ("model", "sampler"),
    [
        (LinearModel(THETA, shape=(2, 3)), DDIM(STEPS)),
        (LinearModel(THETA, "flow", RectifiedFlow(3.0), (2, 3)), FlowEuler(STEPS)),
    ],
    ids=["DDIM", "FlowEuler"],
)
@pytest.mark.parametrize(("start", "steps"), [(0, 3), (1, 4), (2, 1)])
def test_leap_equals_one_sampler_step_between_two_grid_points(
    model: LinearModel, sampler: Sampler, start: int, steps: int
) -> None:
    """Computed by hand: `x_s = alpha_s x_0 + sigma_s eps`, with `x_0` and `eps` from one network call at `t`."""
    chain = chain_of(model, sampler)
    x, t, s = noise(), chain.grid[start][0], chain.grid[start + steps - 1][1]
    (alpha, sigma), (alpha_s, sigma_s) = model.schedule.coefficients(t), model.schedule.coefficients(s)
    raw = THETA * torch.tensor(WEIGHTS).double().view(-1, 1, 1) * x
    x0 = x - sigma * raw if model.prediction == "flow" else (x - sigma * raw) / alpha
    eps = x + alpha * raw if model.prediction == "flow" else raw
    calls = model.calls_with_gradient
    end = chain.leap(State(x, start), steps)
    assert model.calls_with_gradient == calls + 1
    assert end.step == start + steps
    torch.testing.assert_close(end.x, alpha_s * x0 + sigma_s * eps)


def test_leap_of_one_step_equals_that_step() -> None:
    chain = chain_of(LinearModel(THETA, shape=(2, 3)), DPMSolverPlusPlus(STEPS))
    state = chain.advance(chain.start(noise()), 2)
    assert torch.equal(chain.leap(state, 1).x, chain.advance(state, 1).x)
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"cannot advance {steps} steps: 3 of 5 remain"):
            chain.leap(state, steps)
