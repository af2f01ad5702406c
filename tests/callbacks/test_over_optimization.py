"""The guard detects over-optimization, acts on it, saves the best adapters, and does not change training."""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_draft.callbacks import AdapterEMA, OverOptimizationGuard
from lightning_draft.callbacks.shrink import shrink_adapters
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.metrics import image_drift, saturated_pixel_fraction, within_prompt_diversity
from lightning_draft.rewards import Brightness, Sharpness
from lightning_draft.rewards.combine import WeightedReward, ZScoreSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import LastK, RandomK

GUARD = {"max_prompts": 2, "samples_per_prompt": 2}


class Saving(LinearModel):
    """A linear model that saves its parameter as adapters."""

    def save_lora(self, path, metadata=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"theta": self.theta.detach().clone()}, path, metadata=dict(metadata or {}))


class Scripted(DraftModule):
    """Mean scores by the number of finished steps; `held` has standard deviation 2 over the base model's images."""

    def __init__(self, script):
        super().__init__(
            Saving(0.1), LinearReward(), DDIM(4), LastK(2), eval_rewards={"held": Brightness(), "sharp": Sharpness()}
        )
        self.script = script

    def score(self, images, prompts):
        spread = torch.tensor([2.0, -2.0]).repeat(len(images))[: len(images)]
        rewards = self.script[self.trainer.global_step]
        return {name: rewards[name] + spread for name in ("reward", "held", "sharp")}

    def validation_step(self, prompts, batch_idx):
        self.log("val/reward", torch.tensor(0.0), batch_size=1)


class Thetas(Callback):
    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at[trainer.global_step] = pl_module.model.theta.item()


def scripted(rewards, held, sharp=None):
    sharp = [0.0] * len(held) if sharp is None else sharp
    rows = zip(rewards, held, sharp, strict=True)
    return Scripted({step: {"reward": r, "held": h, "sharp": s} for step, (r, h, s) in enumerate(rows)})


@pytest.fixture
def run(make_trainer, data):
    """Fit with a validation after every step; return the trainer and theta by step."""

    def fit(module, *callbacks, steps=None, **options):
        thetas = Thetas()
        steps = len(module.script) - 1 if steps is None else steps
        trainer = make_trainer(
            thetas, *callbacks, max_steps=steps, val_check_interval=1, num_sanity_val_steps=0, **options
        )
        trainer.fit(module, data)
        return trainer, thetas.at

    return fit


@pytest.mark.filterwarnings("ignore:over-optimized")
@pytest.mark.parametrize(
    ("rewards", "held", "options", "warned"),
    [
        ([0, 1, 2, 3], [5, 4.5, 4.1, 3.9], {}, 1),  # a degradation of 1.1 / 2 from the base, at the end
        ([0, 1, 2, 3], [5, 4.5, 4.1, 3.9], {"margin": 0.6}, 0),
        ([0, 1, 2, 3], [5, 6, 6, 4.9], {}, 1),  # from the best evaluation, not from the base
        ([0, 1, 1, 0.5], [5, 6, 6, 0], {}, 0),  # the reward is below what it was at the evaluation reward's best
        ([0, 1, 2, 3], [5, 6, 7, 8], {}, 0),
        ([0, 1, 2, 3], [5, 0, 0, 0], {}, 3),
        ([0, 1, 2, 3], [5, 0, 0, 0], {"patience": 2}, 1),
        ([0, 1, 2, 3, 4], [5, 0, 5, 0, 0], {"patience": 2}, 1),
        ([0, 1, 2, 3], [5, 0, 0, 0], {"eval_rewards": ["sharp"]}, 0),
    ],
)
def test_a_degradation_above_the_margin_with_a_higher_reward_is_over_optimization(run, rewards, held, options, warned):
    guard = OverOptimizationGuard(**GUARD, **options)
    run(scripted(rewards, held), guard)
    assert guard.counts == {"warned": warned, "shrunk": 0, "stopped": 0}
    assert [each.reward for each in guard.history.values()] == rewards


def test_largest_degradation_decides(run):
    guard = OverOptimizationGuard(**GUARD)
    with pytest.warns(
        UserWarning,
        match=r"over-optimized at step 2: the reward rose from 0 to 2 while sharp fell from 1 to -0.5, by 0.75 "
        r"standard deviations; training continues.*best adapters before this \(step 1\) are in .*guarded.safetensors",
    ):
        run(scripted([0, 1, 2], [5, 6, 7], [1, 1, -0.5]), guard)


@pytest.mark.filterwarnings("ignore:over-optimized")
def test_file_contains_the_best_adapters_that_are_not_over_optimized(run, tmp_path):
    """The reward is lower at step 3 and higher at steps 4 and 5, at which the evaluation reward falls."""
    guard = OverOptimizationGuard(**GUARD)
    _, thetas = run(scripted([0, 1, 3, 2, 4, 9], [5, 5, 4.5, 5, 0, 0]), guard)
    assert guard.best_path == tmp_path / "lora" / "guarded.safetensors"
    assert (guard.best_step, guard.best_reward) == (2, 3.0)
    assert load_file(guard.best_path)["theta"].item() == thetas[2]
    with safe_open(guard.best_path, "pt") as file:
        header = file.metadata()
    seen = json.loads(header["guard"])
    assert (seen["reward"], seen["eval/held"], header["step"]) == (3.0, 4.5, "2")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_adapters_with_a_nan_reward_are_not_saved(run, broken):
    guard = OverOptimizationGuard(**GUARD)
    _, thetas = run(scripted([0, broken, 1, broken], [5, 5, 5, 5]), guard)
    assert (guard.best_step, guard.best_reward) == (2, 1.0)
    assert load_file(guard.best_path)["theta"].item() == thetas[2]


def test_stop_ends_training(run, logger):
    guard = OverOptimizationGuard("stop", **GUARD)
    with pytest.warns(UserWarning, match="over-optimized at step 2: .*; training stops; .* \\(step 1\\)"):
        trainer, _ = run(scripted([0, 1, 2, 3, 4, 5], [5, 5, 3, 2, 1, 0]), guard, logger=logger)
    assert trainer.global_step == 2
    assert guard.counts["stopped"] == 1
    assert trainer.callback_metrics["guard/degradation"].item() == pytest.approx(1.0)
    logged = {step: metrics for step, metrics in logger.of("guard/")}
    assert list(logged) == [1, 2]
    assert logged[1]["guard/stopped"] == 0
    assert logged[2]["guard/stopped"] == 1
    assert (logged[2]["guard/reward"], logged[2]["guard/eval/held"], logged[2]["guard/degradation"]) == (2, 3, 1)
    assert {"guard/image_drift", "guard/diversity", "guard/sharpness", "guard/saturated_pixel_fraction"} <= logged[
        2
    ].keys()


def test_low_diversity_is_over_optimization_only_below_min_diversity(run):
    class Collapsing(Scripted):
        """From step 2 on, all images of a prompt are equal."""

        def generate(self, prompts, noise=None, seed=None):
            samples = super().generate(prompts, noise, seed)
            if self.trainer.global_step < 2 or self.model._in_base:
                return samples
            return samples.with_content(samples.images[:1].expand_as(samples.images))

    script = scripted([0, 1, 2, 3], [5, 5, 5, 5]).script
    guard = OverOptimizationGuard("stop", min_diversity=0.5, **GUARD)
    with pytest.warns(UserWarning, match="at step 2: the diversity of the images of one prompt is 0% of the base"):
        trainer, _ = run(Collapsing(script), guard)
    assert trainer.global_step == 2
    run(Collapsing(script), guard := OverOptimizationGuard("stop", **GUARD))
    assert guard.counts["stopped"] == 0


def test_evaluation_equals_directly_computed_statistics(make_diffusion_module, make_trainer, data):
    module = make_diffusion_module(eval_rewards={"sharp": Sharpness()})
    guard = OverOptimizationGuard(samples_per_prompt=3, max_prompts=2, batch_size=4, seed=5)
    make_trainer(guard, max_steps=2, val_check_interval=2, num_sanity_val_steps=0).fit(module, data)
    prompts = [prompt for prompt in data.val_prompts[:2] for _ in range(3)]
    noise = module.model.noise(6, torch.Generator().manual_seed(5))
    images = module.generate(prompts, noise=noise).images
    with module.model.base():
        base = module.generate(prompts, noise=noise).images
    start, end = guard.history[0], guard.history[2]
    scores = module.score(images, prompts)
    assert end.reward == pytest.approx(scores["reward"].mean().item(), rel=1e-5)
    assert end.eval_rewards == {"sharp": pytest.approx(scores["sharp"].mean().item(), rel=1e-4)}
    assert end.image_drift == pytest.approx(image_drift(images, base).mean().item(), rel=1e-4)
    assert end.diversity == pytest.approx(within_prompt_diversity(images, prompts).item(), rel=1e-4)
    assert end.saturated_pixel_fraction == pytest.approx(saturated_pixel_fraction(images).mean().item(), abs=1e-3)
    assert end.sharpness == end.eval_rewards["sharp"]
    assert (start.image_drift, start.reward) == (0, pytest.approx(module.score(base, prompts)["reward"].mean().item()))
    assert end.image_drift > 0


def test_shrink_scales_only_the_lora_update(make_diffusion_module, make_trainer, data):
    """It does so once, at the start of the batch after the evaluation, and scales the average of the adapters too."""

    class Scheduled(OverOptimizationGuard):
        def _compare(self, step, evaluation):
            super()._compare(step, evaluation)
            return "as scheduled" if step == 1 else None

    class Watch(Callback):
        def __init__(self):
            self.end, self.start = {}, {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.end[trainer.global_step] = copy.deepcopy((pl_module.trainable_parameters(), ema.average))

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.start[trainer.global_step] = copy.deepcopy((pl_module.trainable_parameters(), ema.average))

    module, ema, watch = make_diffusion_module(eval_rewards={"sharp": Sharpness()}), AdapterEMA(0.5), Watch()
    guard = Scheduled("shrink", shrink=0.25, **GUARD)
    options = {"max_steps": 3, "val_check_interval": 1, "num_sanity_val_steps": 0}
    with pytest.warns(UserWarning, match="over-optimized at step 1: as scheduled; the adapters are scaled by 0.25"):
        make_trainer(ema, guard, watch, **options).fit(module, data)
    assert guard.counts["shrunk"] == 1
    for before, after in zip(watch.end[1], watch.start[1], strict=True):
        for name, value in before.items():
            assert torch.equal(after[name], value * (0.25 if "lora_B" in name else 1)), name
        assert any(value.any() for name, value in before.items() if "lora_B" in name)
    for before, after in zip(watch.end[2], watch.start[2], strict=True):
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_shrunk_model_equals_the_model_at_that_lora_scale(make_diffusion_module, make_trainer, data):
    module = make_diffusion_module()
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, data)
    noise = module.model.noise(2, torch.Generator().manual_seed(0))
    with module.model.adapter_scale(0.3):
        expected = module.generate(["a cat", "red"], noise=noise).images
    tuned = module.generate(["a cat", "red"], noise=noise).images
    shrink_adapters(trainer, module, 0.3)
    torch.testing.assert_close(module.generate(["a cat", "red"], noise=noise).images, expected, rtol=0, atol=1e-5)
    assert (tuned - expected).abs().max() > 1e-3


def test_training_with_the_guard_equals_training_without(make_diffusion_module, make_trainer):
    def train(*callbacks):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        module = make_diffusion_module(
            truncation=RandomK(), sampler=DDIM(3, eta=1.0), eval_rewards={"sharp": Sharpness()}, kl_weight=0.1
        )
        trainer = make_trainer(*callbacks, max_steps=2, val_check_interval=1, num_sanity_val_steps=0)
        trainer.fit(module, PromptDataModule(["red", "cat", "a cat", "dog", "a dog"], batch_size=1, val_size=2))
        return module, (random.random(), np.random.rand(), torch.rand(()).item())

    guard = OverOptimizationGuard(**GUARD)
    (watched, states), (plain, others) = train(guard), train()
    assert states == others
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in watched.state_dict().items())
    assert watched.training == plain.training
    assert list(guard.history) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:over-optimized")
def test_resumed_guard_decides_as_the_uninterrupted_one(run, make_trainer, data, tmp_path):
    """History, counts and file equal those of the uninterrupted run; the file is in the new folder."""
    script = [0, 1, 2, 3, 4, 5], [5, 8, 7.5, 5, 5, 5]
    whole = OverOptimizationGuard(patience=2, dirpath=str(tmp_path / "one"), **GUARD)
    options = {"monitor": "val/reward", "save_top_k": -1, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(tmp_path, filename="{step}", **options)
    run(scripted(*script), whole, saver, enable_checkpointing=True)
    resumed = OverOptimizationGuard(patience=2, dirpath=str(tmp_path / "two"), **GUARD)
    trainer = make_trainer(resumed, max_steps=5, val_check_interval=1, num_sanity_val_steps=0)
    trainer.fit(scripted(*script), data, ckpt_path=tmp_path / "step=4.ckpt")
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert whole.counts["warned"] == 1
    assert {**ours, "folder": ""} == {**theirs, "folder": ""}
    assert resumed.best_path.parent == tmp_path / "two"
    assert load_file(resumed.best_path)["theta"] == load_file(whole.best_path)["theta"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "panic"}, "action='panic' is not a valid choice; write one of warn, shrink, stop"),
        ({"margin": -1.0}, "margin=-1.0 must be at least 0.0"),
        ({"shrink": 1.5}, "shrink=1.5 must be between 0.0 and 1.0"),
        ({"min_diversity": 2.0}, "min_diversity=2.0 must be between 0.0 and 1.0"),
        (
            {"samples_per_prompt": 1},
            "samples_per_prompt=1 must be at least 2; .* diversity is measured between samples",
        ),
        ({"patience": 0}, "patience=0 must be at least 1"),
    ],
)
def test_invalid_settings_are_rejected(options, message):
    with pytest.raises(ConfigurationError, match=message):
        OverOptimizationGuard(**options)


@pytest.mark.parametrize(
    ("model", "watch", "options", "message"),
    [
        (
            Saving(),
            {},
            {},
            "evaluation rewards, and the module has none; give it rewards .* such as eval_rewards=",
        ),
        (
            Saving(),
            {"held": Brightness()},
            {"eval_rewards": ["hps"]},
            "contains hps, .* write some of held",
        ),
        (Saving(), {"held": Brightness()}, {"eval_rewards": []}, "is empty; leave it out"),
        (Saving(), {"held": Brightness()}, {"action": "shrink"}, "scales LoRA adapters, and this model trains none"),
        (Saving(), {"held": Brightness()}, {"prompts": []}, "has no prompts, .*; set prompts="),
        (LinearModel(), {"held": Brightness()}, {}, "no save_lora.*, so OverOptimizationGuard cannot write"),
    ],
)
def test_run_without_eval_rewards_or_prompts_is_rejected(
    make_module, make_trainer, data, model, watch, options, message
):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(OverOptimizationGuard(**options)).fit(make_module(model=model, eval_rewards=watch), data)


def test_reward_with_running_statistics_gives_a_warning(make_module, make_trainer, data):
    reward = ZScoreSum({"light": WeightedReward(Brightness())})
    module = make_module(model=Saving(), reward=reward, eval_rewards={"held": Brightness()})
    with pytest.warns(UserWarning, match="the scale of ZScoreSum changes with its statistics.*WeightedSum with fixed"):
        make_trainer(OverOptimizationGuard(), max_steps=1).fit(module, data)


class Disagreeing(Scripted):
    """The reward does not fall in the second process."""

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return scores if self.global_rank == 0 else {name: scores["reward"] for name in scores}


class Note(Callback):
    """Records the actions of the guard in each process."""

    def __init__(self, guard, folder):
        self.guard, self.folder = guard, folder

    def on_train_end(self, trainer, pl_module):
        state = {"step": trainer.global_step, **self.guard.state_dict(), "theta": pl_module.model.theta.item()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(state))


def test_two_processes_take_the_same_action_and_one_writes(make_trainer, data, tmp_path):
    module = Disagreeing(scripted([0, 1, 2, 3], [5, 5, 3, 2]).script)
    guard = OverOptimizationGuard("stop", **GUARD)
    trainer = make_trainer(
        *(guard, Note(guard, tmp_path)),
        max_steps=3,
        val_check_interval=1,
        num_sanity_val_steps=0,
        strategy="ddp_fork",
        devices=2,
    )
    trainer.fit(module, data)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert (one["step"], one["counts"]["stopped"], one["best"]) == (2, 1, [1, 1.0])
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["guarded.safetensors"]
