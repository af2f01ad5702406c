"""What every truncation keeps: gradients with recomputation, shared random choices, bounds; and what it rejects."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_draft.truncation as module
from lightning_draft.chain import PredictionDrift
from lightning_draft.errors import ConfigurationError
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, Sampler
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
from tests.truncation_by_hand import BATCH, STEPS, THETA, chain_of, gradient, linear, noise

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
