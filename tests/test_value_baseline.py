"""The value baseline against least squares written out, its effect on the gradient, and checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import PPO, PRDP, Reinforce
from lightning_draft.samplers import DDIM
from lightning_draft.value_baseline import ValueBaseline
from lightning_draft.windows import SlidingWindow
from tests.tiny_policy_gradients import Cut, fit, linear, trainer_of
from tests.tiny_runs import PROMPTS, data

STEPS = [0, 2]


def rollout(seed: int, samples: int = 40) -> tuple[Tensor, Tensor]:
    """Return latents `(2, N, 3, 4, 4)`, and advantages that are a linear function of the last latent's cells."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, samples, 3, 4, 4, dtype=torch.float64, generator=generator)
    return latents, 2.0 * latents[1, :, 0, :2, :2].mean((1, 2)) - latents[1, :, 2, 2:, :2].mean((1, 2)) + 0.3


def test_features_are_means_of_cells_and_one() -> None:
    latents, _ = rollout(0)
    found = ValueBaseline(pool=2).features(latents)
    assert found.shape == (2, 40, 3 * 4 + 1)
    assert found[1, 7, 5].item() == pytest.approx(latents[1, 7, 1, :2, 2:].mean().item())
    assert (found[..., -1] == 1).all()
    assert ValueBaseline().features(torch.randn(2, 5, 7)).shape == (2, 5, 8)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_values_equal_weighted_ridge_regression_on_earlier_rollouts(decay: float) -> None:
    baseline, rows, targets, weights = ValueBaseline(2, ridge=0.7, decay=decay), [], [], []
    for number in range(3):
        latents, advantages = rollout(number)
        baseline.update(baseline.features(latents), advantages, STEPS)
        rows.append(baseline.features(latents))
        targets.append(advantages)
        weights.append(torch.full((40,), decay ** (2 - number), dtype=torch.float64))
    fresh = baseline.features(rollout(9)[0])
    found = baseline.values(fresh, STEPS)
    root, target = torch.cat(weights).sqrt(), torch.cat(targets)
    for index in range(2):
        phi = torch.cat([each[index] for each in rows])
        # Ridge regression is least squares with the rows `sqrt(ridge) I` added.
        matrix = torch.cat([root[:, None] * phi, 0.7**0.5 * torch.eye(phi.shape[1], dtype=torch.float64)])
        right = torch.cat([root * target, torch.zeros(phi.shape[1], dtype=torch.float64)])
        solution = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
        torch.testing.assert_close(found[index], fresh[index] @ solution)


def test_values_are_zero_before_the_first_rollout_and_explain_what_the_latent_predicts() -> None:
    baseline = ValueBaseline(2, ridge=1e-3, decay=1.0)
    latents, advantages = rollout(1)
    assert not baseline.values(baseline.features(latents), STEPS).any()
    for number in range(2, 8):
        baseline.update(baseline.features(rollout(number)[0]), rollout(number)[1], STEPS)
    first, last = advantages - baseline.values(baseline.features(latents), STEPS)
    assert last.std() < 0.01 * advantages.std() < first.std()


def test_gradient_has_the_same_expectation_and_a_smaller_variance() -> None:
    """Of `E[2 x + y]` with `x ~ N(1, 1)` and the step `y = theta x + z`: the score is `z x`, and the gradient is 1."""
    samples, baseline = 100_000, ValueBaseline(decay=1.0)
    found = []
    for seed in (0, 1):  # the first rollout only fits the baseline
        x, z = torch.randn(2, samples, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = x + 1
        rewards = (2 * x + 0.5 * x + z).flatten()
        remaining, explained = baseline.step_advantages(x[None, :, :, 0], rewards, [0])
        found = [(advantages * (z * x).flatten()) for advantages in (rewards, remaining[0])]
    for gradients in found:
        assert abs(gradients.mean() - 1) < 4.5 * gradients.std() / samples**0.5
    assert found[1].var() < 0.3 * found[0].var()
    assert explained > 0.8


@pytest.mark.parametrize("window", [None, SlidingWindow(2, stride=1, rollouts=1)], ids=["all steps", "window"])
def test_loss_uses_the_advantage_of_each_step(window: Any) -> None:
    """Of REINFORCE, with values from the earlier rollouts, recomputed step by step."""
    module = linear(objective=Reinforce(), value_baseline=ValueBaseline(1), sampler=DDIM(5, eta=1.0), window=window)
    oracle = ValueBaseline(1)
    for number in range(3):
        found = module.collect_rollout(PROMPTS, number)
        steps = module.policy_of(number).steps
        features = oracle.features(found.latents[steps])
        values = oracle.values(features, steps).float()
        assert bool(values.any()) == (number > 0)
        oracle.update(features, found.advantages, steps)
        torch.testing.assert_close(found.step_advantages, found.advantages - values)
        log_probs = module.policy_of(number).evaluate(found.prompts, found.latents, steps).log_probs
        loss, _ = module.loss_and_logs(PROMPTS, found, *module.minibatches(len(PROMPTS)))
        torch.testing.assert_close(loss, -((found.advantages - values) * log_probs).mean())
        explained = 1 - (found.step_advantages**2).mean() / (found.advantages**2).mean()
        assert found.summary["train/value_explained"] == pytest.approx(explained.item(), abs=1e-5)


def test_minibatches_use_the_advantages_of_their_steps(tmp_path: Path) -> None:
    found = []
    for accumulate, options in ((1, {}), (6, {"micro_batch_size": 3, "timesteps_per_minibatch": 1})):
        module = linear(value_baseline=ValueBaseline(2), **options)
        found.append(fit(tmp_path, module, steps=3, accumulate_grad_batches=accumulate).gradients[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("interrupted", [False, True], ids=["saved", "interrupted"])
def test_resumed_run_equals_uninterrupted_run(interrupted: bool, tmp_path: Path) -> None:
    """Saved within the second rollout, or interrupted after the third has been added to the statistics."""
    from lightning_draft.callbacks.last_checkpoint import LastCheckpoint

    def run(*callbacks: Any, ckpt: str | None = None) -> tuple[float, Any]:
        baseline = ValueBaseline(2)
        module = linear(value_baseline=baseline, objective=PPO(clip=1e-2), inner_epochs=2, timesteps_per_minibatch=1)
        saving = LastCheckpoint(dirpath=str(tmp_path))
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_steps": 6, "accumulate_grad_batches": 3, "enable_checkpointing": True}
        trainer_of(tmp_path, every, saving, *callbacks, **options).fit(module, data(), ckpt_path=ckpt)
        return module.model.theta.item(), {step: pair[1].tolist() for step, pair in baseline.statistics.items()}

    straight = run()
    if interrupted:
        with pytest.raises(SystemExit):
            run(Cut(14))
    assert run(ckpt=str(tmp_path / ("last.ckpt" if interrupted else "step=3.ckpt"))) == straight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: ValueBaseline(pool=0), "value_baseline.pool=0 must be at least 1"),
        (lambda folder: ValueBaseline(ridge=0.0), "value_baseline.ridge=0.0 must be a positive number"),
        (lambda folder: ValueBaseline(decay=1.5), "value_baseline.decay=1.5 must be between 0 and 1"),
        (
            lambda folder: fit(folder, linear(value_baseline=ValueBaseline(), objective=PRDP())),
            "value_baseline gives each step its own advantage, and PRDP needs one per sample",
        ),
    ],
)
def test_invalid_settings_are_configuration_errors(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(tmp_path)
