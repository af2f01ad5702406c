"""Running statistics of a reward: when they change, equality on all processes, and resuming."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.rewards import Brightness, ColorBalance, GradientNormSum, Sharpness, WeightedReward, ZScoreSum
from lightning_draft.rewards.combine import RunningMoments
from lightning_draft.samplers import DDIM
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import LastK, LowVariance

PROMPTS = [f"prompt {i}" for i in range(12)]


def module(kind: type = ZScoreSum, **options: Any) -> DraftModule:
    parts = {
        "bright": WeightedReward(Brightness(0.2), 3.0),
        "sharp": WeightedReward(Sharpness(), -1.0),
        "red": WeightedReward(ColorBalance(), 0.0),
    }
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": kind(parts),
        "sampler": DDIM(4),
        "truncation": LastK(2),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    }
    return DraftModule(**{**defaults, **options})


def fit(module: DraftModule, folder: Path, *callbacks: L.Callback, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "max_steps": 4,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, PromptDataModule(PROMPTS, batch_size=3, val_size=3), ckpt_path=ckpt_path)
    return trainer


class Scores(L.Callback):
    """Records the images of the reward, and the statistics that each step used."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Tensor]] = []
        self.used: list[dict[str, list[float]]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        observe = pl_module.reward.update_statistics

        def noted(scores: dict[str, Tensor]) -> None:
            self.shown.append(dict(scores))
            observe(scores)

        pl_module.reward.update_statistics = noted

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.used.append(pl_module.reward.get_extra_state())


def test_statistics_start_with_16_images_and_include_each_batch(tmp_path: Path) -> None:
    subject, scores = module(), Scores()
    fit(subject, tmp_path, scores)
    assert [len(shown["bright"]) for shown in scores.shown] == [3] * 6 + [3] * 4
    for name in ("bright", "sharp"):
        every = torch.cat([shown[name] for shown in scores.shown]).double()
        count, mean, variance = subject.reward.get_extra_state()[name]
        assert (count, mean) == pytest.approx((30, every.mean().item()))
        assert variance == pytest.approx(every.var(correction=0).item())
    assert "red" not in subject.reward.get_extra_state()


def test_gain_is_measured_with_the_current_statistics(tmp_path: Path) -> None:
    """Also for the base model: without training the gain is 0, before the first statistics and after."""
    seen: list[float] = []

    class Gain(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["val/gain"]))

    still = module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-30))
    fit(still, tmp_path, Gain(), num_sanity_val_steps=1)
    assert seen == [0, 0, 0]


def test_calibration_uses_the_base_model_s_images_of_the_first_prompts(tmp_path: Path) -> None:
    """Before the first step, computed by hand from the first batch of prompts."""
    scores = Scores()
    subject = module()
    fit(subject, tmp_path, scores, max_steps=1, limit_val_batches=0)
    prompts = PromptDataModule(PROMPTS, batch_size=3, val_size=3).train_dataloader().batch(0)
    fresh = module()
    for number, shown in enumerate(scores.shown[:6]):
        images = fresh.generate(prompts, seed=derive_seed(0, number, 0, 16)).images
        for name, values in fresh.reward.breakdown(images, prompts)[1].items():
            assert torch.equal(values, shown[name])
    assert len({tuple(shown["bright"].tolist()) for shown in scores.shown}) == 7


@pytest.mark.parametrize("kind", [ZScoreSum, GradientNormSum])
def test_micro_batches_change_nothing(kind: type, tmp_path: Path) -> None:
    """Rewards are recomputed in the backward pass with the statistics of the forward pass."""
    whole, parts = module(kind), module(kind, micro_batch_size=1)
    for subject in (whole, parts):
        fit(subject, tmp_path, max_steps=3)
    assert parts.model.theta.item() == pytest.approx(whole.model.theta.item(), rel=1e-6)
    assert whole.model.theta.item() != pytest.approx(0.1, rel=1e-3)
    if kind is ZScoreSum:
        for name, state in whole.reward.get_extra_state().items():
            assert parts.reward.get_extra_state()[name] == pytest.approx(state, rel=1e-5)


def test_validation_does_not_change_the_statistics(tmp_path: Path) -> None:
    one, other = module(truncation=LowVariance(2)), module(truncation=LowVariance(2))
    fit(one, tmp_path)
    fit(other, tmp_path, limit_val_batches=0)
    assert one.reward.get_extra_state() == other.reward.get_extra_state()
    assert torch.equal(one.model.theta, other.model.theta)


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = module(), module()
    fit(whole, tmp_path, saver)
    fit(resumed, tmp_path, ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(whole.model.theta, resumed.model.theta)
    assert whole.reward.get_extra_state() == resumed.reward.get_extra_state()
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"model.theta", "reward._extra_state"}
    assert checkpoint["state_dict"]["reward._extra_state"]["bright"][0] == 18 + 6


def test_statistics_of_an_interrupted_step_are_discarded(tmp_path: Path) -> None:
    """Ctrl-C between the reward and the backward pass of the second half of an optimizer step."""

    class Cut(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 5:
                raise KeyboardInterrupt

    def run(*callbacks: L.Callback, ckpt_path: Path | None = None) -> DraftModule:
        subject = module()
        saving = LastCheckpoint(dirpath=str(tmp_path))
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "limit_val_batches": 0}
        fit(subject, tmp_path, saving, *callbacks, ckpt_path=ckpt_path, **options)
        return subject

    whole = run()
    with pytest.raises(SystemExit):
        run(Cut())
    resumed = run(ckpt_path=tmp_path / "last.ckpt")
    assert resumed.reward.get_extra_state() == whole.reward.get_extra_state()
    assert torch.equal(resumed.model.theta, whole.model.theta)


class Save(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = {"reward": pl_module.reward.get_extra_state(), "theta": pl_module.model.theta.detach()}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_share_their_statistics(tmp_path: Path) -> None:
    fit(module(), tmp_path, Save(tmp_path), strategy="ddp_fork", devices=2, max_steps=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["reward"] == two["reward"]
    assert one["reward"]["bright"][0] == 2 * (18 + 6)
    assert torch.equal(one["theta"], two["theta"])


def test_a_reward_without_statistics_is_resumed_with_a_checkpoint_that_has_them(tmp_path: Path) -> None:
    """In the opposite case the statistics start again."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module(), tmp_path, saver, max_steps=1)
    fit(module(GradientNormSum), tmp_path, ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)


@pytest.mark.parametrize("name", ["reward", "gain"])
def test_an_evaluation_reward_must_not_have_a_log_key_of_the_trained_one(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`{name}` is a log key of the trained reward"):
        module(eval_rewards={name: Brightness()})


def test_a_rollout_updates_the_statistics_once(tmp_path: Path) -> None:
    """The rollout uses the statistics from before it."""
    subject, scores = policy(), Scores()
    fit(subject, tmp_path, scores, max_steps=4, limit_val_batches=0)
    assert [len(shown["bright"]) for shown in scores.shown] == [3] * 6 + [6] * 2
    every = torch.cat([shown["sharp"] for shown in scores.shown]).double()
    assert subject.reward.get_extra_state()["sharp"][1] == pytest.approx(every.mean().item())


def policy() -> PolicyGradientModule:
    parts = {"bright": WeightedReward(Brightness(0.2), 3.0), "sharp": WeightedReward(Sharpness(), -1.0)}
    return PolicyGradientModule(
        LinearModel(0.1), ZScoreSum(parts), DDIM(4, eta=1.0), samples_per_prompt=2, inner_epochs=2
    )


def test_copies_of_a_reward_have_separate_statistics() -> None:
    subject = module()
    other: Callable[..., Tensor] = copy.deepcopy(subject.reward)
    subject.reward.update_statistics({"bright": torch.tensor([1.0, 2.0]), "sharp": torch.tensor([0.0, 2.0])})
    assert other.needs_calibration  # type: ignore[attr-defined]


def test_nested_sums_have_separate_statistics() -> None:
    """The outer sum needs calibration, updates its own statistics, and passes the scores of the inner sum on."""

    def parts() -> dict[str, WeightedReward]:
        return {"bright": WeightedReward(Brightness(0.2)), "sharp": WeightedReward(Sharpness())}

    inner = ZScoreSum(parts())
    outer = ZScoreSum({"inner": WeightedReward(inner), "red": WeightedReward(ColorBalance())})
    assert outer.needs_calibration
    assert inner.needs_calibration
    scores = {name: torch.rand(4) for name in ("inner", "red", "inner/bright", "inner/sharp")}
    outer.update_statistics(scores)
    for reward, names in ((outer, ("inner", "red")), (inner, ("bright", "sharp"))):
        for name in names:
            key = name if reward is outer else f"inner/{name}"
            count, mean, _ = reward.get_extra_state()[name]
            assert (count, mean) == pytest.approx((4, scores[key].double().mean().item()))
    assert not outer.needs_calibration
    inner.load_state_dict(ZScoreSum(parts()).state_dict())
    assert outer.needs_calibration


def test_constant_scores_are_not_divided_by_their_standard_deviation() -> None:
    moments = RunningMoments(memory=100)
    moments.update(torch.full((3,), 0.1))
    assert moments.std == 1
    moments.update(torch.tensor([0.1, 0.2]))
    assert moments.std == pytest.approx(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2]).std(correction=0).item())


def test_non_finite_scores_are_excluded_from_the_statistics() -> None:
    """Otherwise every later reward would be NaN."""
    subject = module()
    subject.update_statistics({"bright": torch.tensor([1.0, 2.0]), "sharp": torch.tensor([0.0, 2.0])})
    before = subject.reward.get_extra_state()
    subject.update_statistics({"bright": torch.tensor([1.0, float("nan")]), "sharp": torch.tensor([0.0, 2.0])})
    assert subject.reward.get_extra_state() == before
