"""Truncations against gradients computed by hand.

With the network `eps = theta x` a step of DDIM is `x_{i+1} = A_i x_i + B_i eps = c_i x_i`, so that every gradient is a
sum over the steps with gradient. `Walk` contains these numbers.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_draft.truncation as module
from lightning_draft.chain import PredictionDrift, Recompute, SamplingChain, State
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning, Prediction
from lightning_draft.prompt import Prompt
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow, VariancePreserving
from lightning_draft.testing import LinearModel, scaled_linear
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

STEPS, THETA, BATCH = 5, 0.3, 4
VARIANTS: list[Truncation] = [
    Full(),
    LastK(1),
    LastK(3),
    LowVariance(1),
    LowVariance(3),
    ReFL(m=4),
    RandomK(),
    RandomK(max_k=3),
    RandomSteps(),
    DRTune(k=2, m=3),
    DRTune(k=5, m=1),
    DRTune(k=2, m=3, coverage="end"),
    DRTune(k=3, m=0, late_bias=1.0, rescale=0.5),
]
battery = pytest.mark.parametrize("truncation", VARIANTS, ids=lambda t: f"{type(t).__name__}{list(vars(t).values())}")


def test_the_parametrized_tests_cover_every_variant() -> None:
    shipped = {
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Truncation) and member is not Truncation
    }
    assert {type(truncation) for truncation in VARIANTS} == shipped


def linear(prediction: Prediction = "epsilon", **grid: Any) -> LinearModel:
    return LinearModel(THETA, prediction, scaled_linear(**grid), shape=(2, 3))


def chain_of(model: LinearModel, sampler: Sampler | None = None, seed: int = 0, **options: Any) -> SamplingChain:
    """A batch of four prompts with different weights."""
    prompts = [Prompt("a", {"weight": weight}) for weight in (1.0, 0.5, -1.0, 2.0)]
    generator = torch.Generator().manual_seed(seed)
    return SamplingChain(model, sampler or DDIM(STEPS), model.encode(prompts), generator=generator, **options)


def noise(seed: int = 3) -> Tensor:
    return torch.randn(BATCH, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(latents: Tensor, model: LinearModel) -> float:
    """`d (sum of latents) / d theta`."""
    (found,) = torch.autograd.grad(latents.sum(), model.theta)
    return found.item()


@dataclass
class Walk:
    """`A_i`, `B_i` and the latents `x_0 .. x_N` of a DDIM chain, computed without the package."""

    a: list[float]
    b: list[float]
    x: list[Tensor]
    weight: Tensor

    def sum(self, steps: set[int], attached: bool = True) -> float:
        """`sum_{i in S} B_i x_i prod_{j > i} d x_{j+1} / d x_j`, summed over the batch.

        Args:
            steps: `S`, the steps whose network output carries a gradient.
            attached: Whether the network's input does: then later steps of `S` contribute their Jacobian.
        """
        total = torch.zeros_like(self.x[0])
        for i in steps:
            term = self.b[i] * self.weight * self.x[i]
            for j in range(i + 1, len(self.a)):
                inside = self.b[j] * THETA * self.weight if attached and j in steps else 0.0
                term = term * (self.a[j] + inside)
            total = total + term
        return total.sum().item()


def sample_steps(chain: SamplingChain, start: Tensor, stop: int | None = None) -> Walk:
    """Sample DDIM by hand; at step `stop`, use the predicted `x_0` (`A = 1/a`, `B = -s/a`)."""
    schedule, model = chain.model.schedule, chain.model
    assert isinstance(schedule, VariancePreserving)
    weight = chain.conditioning.tensors["weight"].view(-1, 1, 1)
    result = Walk([], [], [start], weight)
    for i, (t, s) in enumerate(chain.grid):
        abar = schedule.alphas_cumprod[int(t)]
        end = 1.0 if i == stop else schedule.alphas_cumprod[int(s)] if s >= 0 else schedule.final_alpha_cumprod
        if model.prediction == "epsilon":
            a = (end / abar) ** 0.5
            b = (1 - end) ** 0.5 - (end * (1 - abar) / abar) ** 0.5
        else:
            a = (end * abar) ** 0.5 + ((1 - end) * (1 - abar)) ** 0.5
            b = ((1 - end) * abar) ** 0.5 - (end * (1 - abar)) ** 0.5
        result.a.append(a)
        result.b.append(b)
        result.x.append((a + b * THETA * weight) * result.x[-1])
        if i == stop:
            break
    return result


PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
GRIDS = pytest.mark.parametrize(
    "grid",
    [{}, {"final_alpha_cumprod": None}, {"spacing": "leading", "steps_offset": 1}],
    ids=["trailing", "trailing-last-abar", "leading"],
)


# The oracles.


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


# What every truncation keeps.


def run(
    truncation: Truncation, model: LinearModel, sampler: Sampler, measure: bool, recompute: Recompute
) -> tuple[Tensor, float, Any]:
    torch.manual_seed(11)
    drift = PredictionDrift() if measure else None
    latents = truncation(chain_of(model, sampler, drift=drift, recompute=recompute), noise())
    measured = None if drift is None else drift.mean
    loss = (latents.square()).sum() + (0 if measured is None else measured)
    (found,) = torch.autograd.grad(loss, model.theta)
    return latents.detach(), found.item(), None if measured is None else measured.item()


@battery
@pytest.mark.parametrize("sampler", [DDIM(STEPS), DDIM(STEPS, eta=1.0), DPMSolverPlusPlus(STEPS)], ids=["0", "1", "2M"])
@pytest.mark.parametrize("drift", [False, True])
def test_recomputation_changes_no_gradient(truncation: Truncation, sampler: Sampler, drift: bool) -> None:
    model = LinearModel(THETA, "v_prediction", shape=(2, 3))
    with torch.no_grad():
        model.theta.add_(0.2)
    latents, value, measured = run(truncation, model, sampler, drift, Recompute())
    for recompute in (
        Recompute(steps=True),
        *(Recompute(micro_batch_size=size) for size in (1, 2, 3, 4, 100)),
        Recompute(steps=True, micro_batch_size=3),
    ):
        again = run(truncation, model, sampler, drift, recompute)
        torch.testing.assert_close(again[0], latents, rtol=1e-13, atol=0)
        assert again[1] == pytest.approx(value, rel=1e-12)
        assert again[2] == (None if measured is None else pytest.approx(measured, rel=1e-12))


@battery
def test_equal_generators_give_equal_choices(truncation: Truncation) -> None:
    """For any random states of the processes."""
    results = set()
    for own_state in range(3):
        torch.manual_seed(own_state)
        model = linear()
        latents = truncation(chain_of(model, seed=5), noise())[:BATCH]
        results.add(gradient(latents, model))
    assert len(results) == 1


@battery
def test_random_choices_do_not_use_the_global_generator(truncation: Truncation) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    truncation(chain_of(linear()), noise())
    assert torch.equal(before, torch.get_rng_state()) != isinstance(truncation, LowVariance)


@battery
def test_gradient_reaches_theta_for_every_random_choice(truncation: Truncation) -> None:
    for seed in range(20):
        model = linear()
        assert gradient(truncation(chain_of(model, seed=seed), noise()), model) != 0


@battery
def test_gradient_steps_bounds_the_chain(truncation: Truncation) -> None:
    """The largest number of calls with gradient over many random choices, without copies."""
    most = 0
    for seed in range(60):
        model = linear()
        truncation(chain_of(model, seed=seed), noise())
        most = max(most, model.calls_with_gradient)
    bound = truncation.gradient_steps(STEPS)
    if isinstance(truncation, RandomSteps):  # all steps at once are chosen rarely
        assert bound == STEPS >= most > 1
    else:
        assert most - isinstance(truncation, LowVariance) == bound


# Cost. Calls are network calls on the batch; g = 1.


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("truncation", "without", "attached"),
    [
        (Full(), 0, STEPS),
        (LastK(1), STEPS - 1, 1),
        (LastK(4), STEPS - 4, 4),
        (LowVariance(2), STEPS - 1, 2),  # one on the batch, one on its copies joined
        (ReFL(m=1), STEPS - 1, 1),
        (RandomK(max_k=1), STEPS - 1, 1),
        (DRTune(k=2, m=1), STEPS - 2, 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Truncation) else str(value),
)
def test_number_of_network_calls(truncation: Truncation, without: int, attached: int, checkpointed: bool) -> None:
    """`T` sampling calls; a checkpointed step is called once more in the backward pass."""
    model = linear()
    latents = truncation(chain_of(model, recompute=Recompute(steps=checkpointed)), noise())
    assert (model.calls_without_gradient, model.calls_with_gradient) == (without, attached)
    latents.sum().backward()
    assert (model.calls_without_gradient, model.calls_with_gradient) == (without, attached * (1 + checkpointed))


def test_low_variance_needs_one_forward_pass_per_copy() -> None:
    """Samples through the network: `(T + n) B` forward, of which `(1 + n) B` with gradient."""
    sizes: list[tuple[bool, int]] = []

    class Counting(LinearModel):
        def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
            sizes.append((torch.is_grad_enabled(), len(x)))
            return super().forward(x, t, conditioning)

    LowVariance(3)(chain_of(Counting(THETA, shape=(2, 3))), noise())
    assert sum(size for _, size in sizes) == (STEPS + 3) * BATCH
    assert sum(size for attached, size in sizes if attached) == (1 + 3) * BATCH


def saved_tensors(make: Callable[[], Tensor]) -> int:
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return count


@pytest.mark.parametrize("truncation", [LastK(1), LastK(3), LowVariance(2), ReFL(m=1)], ids=lambda t: type(t).__name__)
def test_steps_without_gradient_store_no_activations(truncation: Truncation) -> None:
    """The saved activations do not grow with the length of the chain."""
    counts = {
        steps: saved_tensors(lambda: truncation(chain_of(linear(), DDIM(steps)), noise()))  # noqa: B023
        for steps in (4, 40)
    }
    assert counts[4] == counts[40] > 0


def test_untrained_step_stores_no_network_activations() -> None:
    """DRTune with one trained step: for other steps, only values for the linear path are saved."""
    model = linear()
    inside = 0
    forward = model.forward

    def counted(x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        nonlocal inside
        saved: list[Tensor] = []
        inside += saved_tensors(lambda: saved.append(forward(x, t, conditioning)) or saved[0])
        return saved[0]

    model.forward = counted  # type: ignore[method-assign]
    DRTune(k=1, m=1)(chain_of(model), noise())
    one = inside
    DRTune(k=3, m=1)(chain_of(model), noise())
    assert inside - one == 3 * one > 0


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


# Random choices. Frequencies of 3000 choices lie within 4.5 standard errors.

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


# Invalid settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastK(0), "k=0 must be at least 1"),
        (lambda: LowVariance(0), "copies=0 must be at least 1"),
        (lambda: ReFL(m=0), "m=0 must be at least 1"),
        (lambda: RandomK(max_k=0), "max_k=0 must be at least 1"),
        (lambda: DRTune(k=0), "k=0 must be at least 1"),
        (lambda: DRTune(m=-1), "m=-1 must be at least 0"),
        (lambda: DRTune(coverage="all"), "coverage='all' is not a valid choice; write one of uniform, end"),  # type: ignore[arg-type]
        (lambda: DRTune(late_bias=-1.0), "late_bias=-1.0 must be at least 0"),
        (lambda: DRTune(rescale=-1.0), "rescale=-1.0 must be at least 0"),
    ],
)
def test_invalid_settings_are_configuration_errors(make: Callable[[], Truncation], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("truncation", "name"),
    [(LastK(7), "k"), (ReFL(m=7), "m"), (RandomK(max_k=7), "max_k"), (DRTune(k=7, m=1), "k"), (DRTune(k=1, m=7), "m")],
    ids=lambda value: type(value).__name__ if isinstance(value, Truncation) else value,
)
def test_more_steps_than_the_sampler_has_are_rejected(truncation: Truncation, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}=7 exceeds the sampler's num_steps=5; lower {name}$"):
        truncation(chain_of(linear()), noise())
