"""Runs of policy gradients: the reward increases, and checkpoints and interruptions change nothing."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_draft.advantages import GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.callbacks.lora_header import header
from lightning_draft.methods.draft import DraftModule
from lightning_draft.objectives import PPO, PRDP, Objective, Reinforce
from lightning_draft.rewards import Brightness, ColorBalance, Reward, Sharpness, WeightedReward, ZScoreSum
from lightning_draft.samplers import DDIM, FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel, LinearReward
from tests.tiny_policy_gradients import MILD, Cut, Recorder, fit, linear, make, trainer_of
from tests.tiny_runs import data, values


@pytest.mark.parametrize(
    ("objective", "advantage_estimator", "epochs"),
    [
        (Reinforce(), PerPromptStatistics(8, 4), 1),
        (PPO(clip=1e-2), PerPromptStatistics(8, 4), 2),
        (PPO(clip=1e-2), LeaveOneOut(), 2),
        (PPO(clip=1e-2), GroupRelative(divide_by_std=True), 2),
        (PRDP(beta=0.01, clip=1e-2), GroupRelative(), 2),
    ],
    ids=["REINFORCE", "PPO", "LOOP", "GRPO", "PRDP"],
)
def test_reward_without_gradient_increases(
    tmp_path: Path, objective: Objective, advantage_estimator: Any, epochs: int
) -> None:
    """The model can only scale its images: their JPEG size, which has no gradient, decreases."""

    class Small(Reward):
        differentiable = False

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return -torch.tensor([float(image.numpy().std()) for image in images])

    module = linear(
        model=LinearModel(0.1, schedule=MILD),
        sampler=DDIM(3, eta=1.0),
        reward=Small(),
        objective=objective,
        advantage_estimator=advantage_estimator,
        inner_epochs=epochs,
        samples_per_prompt=8,
    )
    recorder = fit(tmp_path, module, steps=30)
    rewards = recorder.of("train/reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.005
    assert module.reward_queries == 16 * 30 // epochs


def test_rectified_flow_with_flow_sde_raises_the_reward(tmp_path: Path) -> None:
    model = LinearModel(0.1, prediction="flow", schedule=RectifiedFlow())
    recorder = fit(
        tmp_path, linear(model=model, sampler=FlowSDE(4), advantage_estimator=GroupRelative(divide_by_std=True))
    )
    assert recorder.of("train/ratio") == [1]
    assert recorder.gradients[0].abs() > 0


def test_only_adapters_change_and_validation_is_that_of_all_methods(tiny_sd: Path, tmp_path: Path) -> None:
    module = make(tiny_sd, reward=ColorBalance(), timesteps_per_minibatch=1)
    before = values(module)
    trainer = trainer_of(tmp_path, max_steps=2, accumulate_grad_batches=3, limit_val_batches=None)
    (first,) = trainer.validate(module, data(), verbose=False)
    assert first["val/gain"] == 0
    trainer.fit(module, data())
    after, trained = values(module), module.trainable_parameters().keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in trained), name
    assert trainer.callback_metrics["val/gain"] != 0
    assert header(trainer, module)["method"] == "PPO(reduction='mean', clip=0.0001, advantage_clip=5.0, form='min')"


# Checkpoints.


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, {"objective": PPO(clip=1e-2), "inner_epochs": 2, "advantage_estimator": PerPromptStatistics(6, 3)}),
        (4, {"objective": PPO(clip=1e-2), "inner_epochs": 2, "advantage_estimator": PerPromptStatistics(6, 3)}),
        (3, {"objective": PRDP(clip=1e-2), "inner_epochs": 2, "advantage_estimator": GroupRelative()}),
        (3, {"objective": Reinforce(), "advantage_estimator": PerPromptStatistics(6, 3)}),
    ],
    ids=["PPO within a rollout", "PPO between rollouts", "PRDP within a rollout", "REINFORCE"],
)
@pytest.mark.parametrize("pipeline", [False, True], ids=["linear", "pipeline"])
def test_resumed_run_equals_uninterrupted_run(
    tiny_sd: Path, tmp_path: Path, stop: int, options: dict[str, Any], pipeline: bool
) -> None:
    settings = {"timesteps_per_minibatch": 1, "seed": 4, **options}

    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        settings["advantage_estimator"] = type(options["advantage_estimator"])(
            *([6, 3] * isinstance(options["advantage_estimator"], PerPromptStatistics))
        )
        module = make(tiny_sd, **settings) if pipeline else linear(**settings)
        recorder = Recorder()
        trainer = trainer_of(
            tmp_path, recorder, *callbacks, max_steps=steps, accumulate_grad_batches=3, enable_checkpointing=True
        )
        trainer.fit(module, data(), ckpt_path=ckpt)
        return values(module), trainer.optimizers[0].state_dict()["state"], recorder

    straight = run(6)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    file = tmp_path / f"step={stop}.ckpt"
    kept = torch.load(file, weights_only=True)["rollouts"]
    assert [state["rollout"] is None for state in kept] == [stop == 4 or "inner_epochs" not in options]
    torch.manual_seed(99)
    resumed = run(6, ckpt=str(file))
    assert [*first[2].of("train/reward"), *resumed[2].of("train/reward")] == straight[2].of("train/reward")
    for name, value in straight[0].items():
        assert torch.equal(resumed[0][name], value), name
    for index, moments in straight[1].items():
        for name, value in moments.items():
            assert torch.equal(resumed[1][index][name], value), (index, name)


@pytest.mark.parametrize(
    ("at", "accumulate", "options"),
    [
        (9, 3, {"objective": PPO(clip=1e-2), "inner_epochs": 2}),
        (12, 3, {"objective": PPO(clip=1e-2), "inner_epochs": 2}),
        (9, 3, {"objective": Reinforce()}),
        (11, 6, {"objective": Reinforce()}),
        (12, 3, {"objective": PRDP(clip=1e-2), "inner_epochs": 2}),
    ],
    ids=["last part of a pass", "last of a rollout", "last of the only pass", "in a step's second rollout", "PRDP"],
)
def test_run_interrupted_within_a_rollout_resumes_bitwise(
    tmp_path: Path, at: int, accumulate: int, options: dict[str, Any]
) -> None:
    """The statistics of advantage estimator and reward from the interrupted step are discarded."""

    def run(*callbacks: Callback, ckpt: Path | None = None) -> Any:
        parts = {"bright": WeightedReward(Brightness(0.2), 3.0), "sharp": WeightedReward(Sharpness(), -1.0)}
        reward, estimator = ZScoreSum(parts), PerPromptStatistics(6, 3)
        module = linear(reward=reward, advantage_estimator=estimator, timesteps_per_minibatch=1, **options)
        saving = LastCheckpoint(dirpath=str(tmp_path))
        settings = {"max_steps": 6, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
        trainer_of(tmp_path, saving, *callbacks, **settings).fit(module, data(), ckpt_path=ckpt)
        return module.model.theta.item(), estimator.state_dict(), reward.get_extra_state()

    straight = run()
    with pytest.raises(SystemExit):
        run(Cut(at))
    assert run(ckpt=tmp_path / "last.ckpt") == straight


@pytest.mark.parametrize(
    "first", [linear(), DraftModule(LinearModel(), LinearReward(), DDIM(4))], ids=["LOOP", "DRaFT"]
)
def test_a_checkpoint_of_another_advantage_estimator_or_method_loads_without_the_missing_state(
    first: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    other = linear(advantage_estimator=PerPromptStatistics())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint is of")
        trainer_of(tmp_path, max_steps=2).fit(other, data(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert len(other.advantage_estimator.state_dict()["seen"]) == 2


def test_a_new_run_starts_without_the_statistics_of_an_earlier_one(tmp_path: Path) -> None:
    estimator = PerPromptStatistics(8, 2)
    first, second = (
        fit(tmp_path, linear(advantage_estimator=estimator), 3).of("train/advantage_std") for _ in range(2)
    )
    assert len(set(first)) > 1
    assert second == first
