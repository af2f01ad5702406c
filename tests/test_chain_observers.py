"""Observers of the sampling chain, and what is computed again: probes, drift, and recomputed steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import PredictionDrift, State
from lightning_draft.models.base import Conditioning, Prediction
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel, scaled_linear
from tests.tiny_chain import STEPS, THETA, WEIGHTS, Spy, chain_of, noise


def test_probe_receives_latents_with_gradient_and_their_gradient() -> None:
    """The gradient at step `i` is `d x_N / d x_{i+1}`, a product of the factors of later steps."""
    arrived: dict[int, Tensor] = {}

    def probe(step: int, latent: Tensor) -> None:
        latent.register_hook(lambda gradient: arrived.__setitem__(step, gradient))

    model = LinearModel(THETA, shape=(2, 3))
    for recompute in (Recompute(), Recompute(steps=True), Recompute(micro_batch_size=3)):
        arrived.clear()
        chain = chain_of(model, probes=(probe,), recompute=recompute)
        with torch.no_grad():
            state = chain.advance(chain.start(noise()), 2)
        x2 = state.x
        end = chain.advance(state).x
        end.sum().backward()
        assert sorted(arrived) == [2, 3, 4]
        torch.testing.assert_close(arrived[4], torch.ones_like(x2))
        plain = chain_of(model)
        for step in (2, 3):
            with torch.no_grad():
                x = plain.advance(State(x2, 2), step - 1).x
                ratio = plain.advance(State(x, step + 1)).x / x
            torch.testing.assert_close(arrived[step], ratio)


def test_probe_receives_predictions_but_no_latents_without_a_graph() -> None:
    seen: list[int] = []
    chain = chain_of(LinearModel(THETA, shape=(2, 3)), probes=(lambda step, latent: seen.append(step),))
    with torch.no_grad():
        state = chain.advance(chain.start(noise()), 3)
        chain.predict(state)
    assert seen == []
    chain.predict(state)
    assert seen == [3]


@pytest.mark.parametrize("sampler", [DDIM(STEPS), DPMSolverPlusPlus(STEPS), FlowEuler(STEPS), FlowSDE(STEPS)])
def test_drift_equals_the_difference_of_the_noise_predictions(sampler: Sampler) -> None:
    """Two linear networks at the same latents, with `eps` from `x_0` and from the velocity computed by hand."""
    flow = isinstance(sampler, FlowEuler)
    prediction: Prediction = "flow" if flow else "v_prediction"
    model = LinearModel(THETA, prediction, RectifiedFlow() if flow else scaled_linear(), (2, 3))
    with torch.no_grad():
        model.theta.add_(0.1)
    drift = PredictionDrift()
    chain = chain_of(model, sampler, drift=drift)
    torch.manual_seed(0)
    chain.advance(chain.start(noise()))
    torch.manual_seed(0)
    plain = chain_of(model, sampler)
    state, terms = plain.start(noise()), []
    for t, _ in plain.grid:
        alpha, _ = model.schedule.coefficients(t)  # d eps / d v is alpha for both, `eps = x + (1 - t) v` for flows
        with torch.no_grad():
            weight = torch.tensor(WEIGHTS).double().view(-1, 1, 1)
            terms.append((alpha * 0.1 * weight * state.x).square().mean())
            state = plain.advance(state, 1)
    assert drift.mean is not None
    assert drift.mean.item() == pytest.approx(torch.stack(terms).mean().item())


def test_drift_is_measured_only_at_steps_with_gradient() -> None:
    model, drift = Spy(), PredictionDrift()
    chain = chain_of(model, drift=drift)
    with torch.no_grad():
        state = chain.advance(chain.start(noise()), 2)
    state = chain.advance(state, 2, output_gain=0.0)
    assert drift.mean is None
    assert len(model.calls) == 4
    chain.advance(state)
    assert len(model.calls) == 6
    assert drift.mean is not None


# What is computed again.


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, [4], []),
        ({"steps": True}, [4], [4]),
        ({"micro_batch_size": 4}, [4], []),
        ({"micro_batch_size": 3}, [3, 1], [1, 3]),
        ({"micro_batch_size": 2, "steps": True}, [2, 2], [2, 2]),
        ({"micro_batch_size": 1}, [1] * 4, [1] * 4),
    ],
)
def test_slices_and_recomputed_calls_of_the_backward_pass(
    options: dict[str, Any], forward: list[int], backward: list[int]
) -> None:
    model = Spy()
    chain = chain_of(model, recompute=Recompute(**options))
    with torch.no_grad():
        state = chain.advance(chain.start(noise()), STEPS - 1)
    assert [size for size, _, _ in model.calls] == [4] * (STEPS - 1)
    model.calls.clear()
    model.weights.clear()
    end = chain.advance(state).x
    assert [size for size, _, _ in model.calls] == forward
    assert [weight for part in model.weights for weight in part] == list(WEIGHTS)
    model.weights.clear()
    end.sum().backward()
    assert [len(part) for part in model.weights] == backward


def test_checkpointed_steps_store_no_activations() -> None:
    """If all steps are attached, only latents are stored, regardless of the network's activations."""

    class Wide(LinearModel):
        def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
            inside = x.repeat(1, 50, 1).sin().cos()
            return super().forward(x, t, conditioning) + 1e-3 * inside.mean(1, keepdim=True)

    def kept(checkpointed: bool, steps: int) -> int:
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        chain = chain_of(Wide(THETA, shape=(2, 3)), DDIM(steps), recompute=Recompute(steps=checkpointed))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chain.advance(chain.start(noise()))
        return elements

    def per_step(checkpointed: bool) -> float:
        return (kept(checkpointed, 9) - kept(checkpointed, 5)) / 4

    latent = noise().numel()
    assert per_step(checkpointed=False) > 100 * latent
    assert per_step(checkpointed=True) < 3 * latent
