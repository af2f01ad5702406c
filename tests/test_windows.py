"""Windows of policy gradients: which steps add noise and are trained, against step-by-step computation."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributions import Normal

import lightning_draft.windows as module_of_windows
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.rollout import sample_noise
from lightning_draft.objectives import PPO, PRDP
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.seeds import derive_seed
from lightning_draft.stochastic_flow import DanceSDE, FlowCPS
from lightning_draft.testing import LinearModel
from lightning_draft.windows import RandomWindow, SlidingWindow, StepWindow, noise_at_steps
from tests.tiny_policy_gradients import fit, linear, trainer_of
from tests.tiny_runs import PROMPTS, data

WINDOWS: list[StepWindow] = [SlidingWindow(2, rollouts=1), RandomWindow(2)]
battery = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: type(window).__name__)
SAMPLERS: list[tuple[Sampler, Sampler]] = [
    (DDIM(5, eta=1.0), DDIM(5)),
    (FlowSDE(5), FlowEuler(5)),
    (DanceSDE(5), FlowEuler(5)),
    (FlowCPS(5), FlowEuler(5)),
]
samplers = pytest.mark.parametrize(("sampler", "plain"), SAMPLERS, ids=lambda sampler: type(sampler).__name__)


def model_of(sampler: Sampler) -> LinearModel:
    return LinearModel(0.1, "flow", RectifiedFlow()) if isinstance(sampler, FlowEuler) else LinearModel(0.1)


def test_the_parametrized_tests_cover_every_window() -> None:
    members = [member for _, member in inspect.getmembers(module_of_windows, inspect.isclass)]
    shipped = {each for each in members if issubclass(each, StepWindow) and not inspect.isabstract(each)}
    assert {type(window) for window in WINDOWS} == shipped


@pytest.mark.parametrize(
    ("size", "stride", "rollouts", "starts"),
    [
        (4, None, 1, [0, 4, 5, 0, 4, 5, 0]),
        (4, None, 2, [0, 0, 4, 4, 5, 5, 0]),
        (4, 1, 1, [0, 1, 2, 3, 4, 5, 0]),
        (3, None, 1, [0, 3, 6, 0, 3, 6, 0]),
        (9, None, 1, [0] * 7),
    ],
)
def test_sliding_window_moves_and_starts_again(size: int, stride: Any, rollouts: int, starts: list[int]) -> None:
    window, stochastic = SlidingWindow(size, stride, rollouts), list(range(10, 19))
    found = [window.steps(number, stochastic) for number in range(7)]
    assert found == [stochastic[start : start + size] for start in starts]


def test_random_windows_are_uniform_and_depend_on_the_seed_and_the_number() -> None:
    window = RandomWindow(2, first=5)
    found = [window.steps(number, range(9))[0] for number in range(2000)]
    counts = torch.bincount(torch.tensor(found), minlength=9)
    assert counts[4:].sum() == 0
    assert ((counts[:4] - 500).abs() < 4.5 * (2000 * 0.25 * 0.75) ** 0.5).all()
    assert found[:50] == [RandomWindow(2, first=5).steps(number, range(9))[0] for number in range(50)]
    assert found[:50] != [window.steps(number, range(9), seed=1)[0] for number in range(50)]
    assert {RandomWindow(2).steps(number, range(4))[0] for number in range(50)} == {0, 1, 2}


@battery
@samplers
def test_rollouts_equal_step_by_step_sampling(window: StepWindow, sampler: Sampler, plain: Sampler) -> None:
    """Noise, and the log-probabilities of Gaussians, in the window; the steps of the sampler's ODE elsewhere."""
    model = model_of(sampler)
    module = linear(model=model, sampler=sampler, window=window, seed=3)
    for number in range(3):
        rollout = module.collect_rollout(PROMPTS[:2], number)
        steps = window.steps(number, range(4), seed=3)
        noise = sample_noise(model, 6, [derive_seed(3, number, 0, i) for i in range(4)])
        x, log_probs = noise[0], []
        for step, (t, s) in enumerate(sampler.grid(model.schedule)):
            x0 = model.denoise(x, t, model.encode([""] * 4)).detach()
            used = sampler if step in steps else plain
            transition = used.step(model.schedule, x, x0, t, s)[0]
            x = transition.mean + transition.std * noise[step + 1]
            torch.testing.assert_close(rollout.latents[step + 1], x)
            if step in steps:
                log_probs.append(Normal(transition.mean, transition.std).log_prob(x).flatten(1).mean(1))
        torch.testing.assert_close(rollout.log_probs, torch.stack(log_probs))
        assert rollout.summary["train/window_start"] == steps[0]


@battery
@samplers
def test_log_probabilities_of_a_rollout_are_reproduced(window: StepWindow, sampler: Sampler, plain: Sampler) -> None:
    module = linear(model=model_of(sampler), sampler=sampler, window=window, kl_weight=0.1, objective=PRDP())
    for number in range(3):
        rollout = module.collect_rollout(PROMPTS[:2], number)
        assert torch.equal(rollout.log_probs, rollout.ref_log_probs)
        _, logs = module.loss_and_logs(PROMPTS[:2], rollout, *module.minibatches(2))
        assert (logs["train/ratio"], logs["train/kl"]) == (1, 0)


@battery
def test_only_the_window_is_trained(window: StepWindow) -> None:
    model = LinearModel(0.1)
    module = linear(model=model, sampler=DDIM(7, eta=1.0), window=window)
    rollout = module.collect_rollout(PROMPTS[:2], 1)
    assert (model.calls_with_gradient, model.calls_without_gradient) == (0, 7)
    module.loss_and_logs(PROMPTS[:2], rollout, *module.minibatches(2))
    assert (model.calls_with_gradient, model.calls_without_gradient) == (2, 7)


def test_window_of_all_steps_equals_no_window() -> None:
    found = []
    for window in (None, SlidingWindow(3)):
        module = linear(window=window, objective=PPO(clip=1e-2))
        rollout = module.collect_rollout(PROMPTS[:2], 4)
        module.model.theta.data += 0.02
        loss, _ = module.loss_and_logs(PROMPTS[:2], rollout, *module.minibatches(2))
        found.append((rollout.latents, rollout.log_probs, loss))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@battery
@pytest.mark.parametrize("objective", [PPO(clip=1e-2), PRDP()], ids=lambda objective: type(objective).__name__)
def test_resumed_run_equals_uninterrupted_run(window: StepWindow, objective: Any, tmp_path: Path) -> None:
    """Saved within the second rollout, whose window is not that of the first."""

    def run(steps: int, ckpt: Path | None = None) -> float:
        module = linear(window=window, objective=objective, inner_epochs=2, sampler=DDIM(6, eta=1.0), seed=5)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = trainer_of(tmp_path, saving, max_steps=steps, enable_checkpointing=True)
        trainer.fit(module, data(), ckpt_path=None if ckpt is None else str(ckpt))
        assert (
            trainer.callback_metrics["train/window_start"]
            == window.steps((steps - 1) // 2, module.policy.steps, seed=5)[0]
        )
        return module.model.theta.item()

    straight = run(6)
    assert run(6, tmp_path / "step=3.ckpt") == straight


@battery
def test_windows_differ_between_rollouts(window: StepWindow, tmp_path: Path) -> None:
    module = linear(window=window, sampler=DDIM(7, eta=1.0), seed=2)
    recorder, stochastic = fit(tmp_path, module, steps=3), module.policy.steps
    assert recorder.of("train/window_start") == [window.steps(number, stochastic, seed=2)[0] for number in range(3)]
    assert len(set(recorder.of("train/window_start"))) > 1
    assert recorder.of("train/ratio") == [1, 1, 1]


def test_noise_at_no_step_is_the_deterministic_sampler() -> None:
    for sampler, plain in [*SAMPLERS, (DPMSolverPlusPlus(5), DPMSolverPlusPlus(5))]:
        schedule, (x, x0) = model_of(sampler).schedule, torch.randn(2, 2, 3, dtype=torch.float64)
        quiet = noise_at_steps(sampler, [])
        assert quiet.grid(schedule) == sampler.grid(schedule)
        for t, s in sampler.grid(schedule):
            ours, theirs = (each.step(schedule, x, x0, t, s)[0] for each in (quiet, plain))
            assert ours.std == 0
            assert torch.equal(ours.mean, theirs.mean)


class NoPlainForm(DDIM):
    deterministic = Sampler.deterministic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "window.size=0 must be at least 1"),
        (lambda: SlidingWindow(2, stride=0), "window.stride=0 must be at least 1"),
        (lambda: SlidingWindow(2, rollouts=0), "window.rollouts=0 must be at least 1"),
        (
            lambda: RandomWindow(3, first=2),
            "window.first=2 must be at least 3; write 3 or more, because window.size is 3",
        ),
        (
            lambda: linear(window=SlidingWindow(4)).policy_of(0),
            "window.size=4 exceeds the 3 sampling steps that add noise; write 3 or less",
        ),
        (
            lambda: linear(window=SlidingWindow(1), sampler=NoPlainForm(4, eta=1.0)).policy_of(0),
            r"sampler=NoPlainForm has no method `deterministic`, .*; write sampler=DDIM\(eta=1\)",
        ),
        (lambda: SlidingWindow(1).steps(0, []), "window.size=1 exceeds the 0 sampling .* use a sampler with noise"),
    ],
)
def test_invalid_windows_are_configuration_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_window_that_does_not_fit_stops_the_run_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="window.size=4 exceeds"):
        fit(tmp_path, linear(window=RandomWindow(4)))
