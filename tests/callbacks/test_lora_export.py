import copy
import errno
import json
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_draft.callbacks import AdapterEMA, LoRAExport
from lightning_draft.callbacks.adapter_files import copy_from_resumed_run
from lightning_draft.callbacks.lora_header import describe
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.rewards import Brightness, ImageQuality, Relative, Sharpness, WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import LastK


class Saving(LinearModel):
    """A linear model that saves its parameter as adapters."""

    source = "linear"

    def save_lora(self, path, metadata=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"theta": self.theta.detach().clone()}, path, metadata=dict(metadata or {}))


@pytest.fixture
def make_saving_module(make_module):
    return lambda **options: make_module(**{"model": Saving(0.1), **options})


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def theta_of(path):
    return load_file(path)["theta"].item()


class Thetas(Callback):
    """Records theta by the number of finished steps."""

    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at[trainer.global_step] = pl_module.model.theta.item()


class Scripted(DraftModule):
    """Validation logs given values, by the number of finished steps."""

    script: dict[int, float]

    def validation_step(self, prompts, batch_idx):
        self.log("val/reward", torch.tensor(self.script[self.trainer.global_step], dtype=torch.float64), batch_size=1)


def scripted(script, **options):
    module = Scripted(model=Saving(0.1), reward=options.pop("reward"), sampler=DDIM(4), truncation=LastK(2), **options)
    module.script = script
    return module


@pytest.fixture
def run(make_trainer, make_module, data):
    """Fit with given validation values at every step; return the callback and theta by step."""

    def fit(scores, callback, *others, **options):
        thetas = Thetas()
        trainer = make_trainer(
            thetas, callback, *others, max_steps=len(scores), val_check_interval=1, num_sanity_val_steps=0, **options
        )
        trainer.fit(scripted(dict(enumerate(scores, 1)), reward=make_module().reward), data)
        return callback, thetas.at

    return fit


def test_diffusers_pipeline_generates_the_same_images(make_diffusion_module, make_trainer, data, tiny_sd, tmp_path):
    module = make_diffusion_module()
    callback = LoRAExport()
    make_trainer(callback, max_steps=3).fit(module, data)
    assert callback.last_path == tmp_path / "lora" / "last.safetensors"

    prompts = ["red cat", "cat"]
    noise = module.model.noise(2, torch.Generator().manual_seed(1))
    tuned = module.generate(prompts, noise=noise).images
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)

    def generate():
        images = pipeline(prompts, num_inference_steps=3, latents=noise.clone(), output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    base = generate()
    pipeline.load_lora_weights(callback.last_path.parent, weight_name=callback.last_path.name)
    torch.testing.assert_close(generate(), tuned.clamp(0, 1), rtol=0, atol=1e-5)
    assert (base - tuned.clamp(0, 1)).abs().max() > 1e-2


def test_header_contains_model_reward_method_step_and_scores(make_diffusion_module, make_trainer, data, tiny_sd):
    callback = LoRAExport()
    trainer = make_trainer(callback, max_steps=2, val_check_interval=2)
    trainer.fit(make_diffusion_module(truncation=LastK(2)), data)
    header = header_of(callback.best_path)
    assert header["base"] == tiny_sd.name
    assert header["method"] == "LastK(k=2)"
    assert header["reward"].startswith("ColorTarget(")
    assert header["step"] == "2"
    scores = json.loads(header["scores"])
    assert scores["val/reward"] == trainer.callback_metrics["val/reward"].item()
    assert {"train/reward", "val/gain"} <= scores.keys()


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_best_file_has_the_adapters_with_the_best_score(run, mode, best):
    scores = [0.1, 0.9, -0.5, 0.9, -0.5]
    callback, thetas = run(scores, LoRAExport(mode=mode))
    assert theta_of(callback.best_path) == thetas[best]
    assert theta_of(callback.last_path) == thetas[5]
    assert (callback.best_step, callback.best_score, callback.best_metric) == (best, scores[best - 1], "val/reward")
    assert header_of(callback.best_path)["step"] == str(best)
    assert json.loads(header_of(callback.best_path)["scores"])["val/reward"] == scores[best - 1]


def test_nan_score_is_never_the_best(run):
    callback, thetas = run([math.nan, 0.2, math.nan], LoRAExport())
    assert theta_of(callback.best_path) == thetas[2]
    assert "val/reward" not in json.loads(header_of(callback.last_path)["scores"])


def test_header_omits_scores_of_other_adapters(make_trainer, make_module, data):
    """Validated after step 2, written after step 3."""
    callback, module = LoRAExport(), scripted({2: 0.5}, reward=make_module().reward)
    make_trainer(callback, max_steps=3, val_check_interval=2, num_sanity_val_steps=0).fit(module, data)
    assert json.loads(header_of(callback.best_path)["scores"])["val/reward"] == 0.5
    header = header_of(callback.last_path)
    assert header["step"] == "3"
    assert json.loads(header["scores"]).keys() == {"train/reward"}


def test_without_validation_there_is_no_best_file(make_saving_module, make_trainer, data):
    callback, thetas = LoRAExport(every_n_steps=2), Thetas()
    make_trainer(thetas, callback, max_steps=5, limit_val_batches=0).fit(make_saving_module(), data)
    assert theta_of(callback.last_path) == thetas.at[5]
    assert (callback.best_step, callback.best_path.exists()) == (None, False)


@pytest.mark.parametrize("monitor", [None, "val/light", "val/reward"])
def test_first_evaluation_reward_is_monitored_by_default(make_saving_module, make_trainer, data, monitor):
    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            step = trainer.global_step
            pl_module.log("val/light", torch.tensor([0.0, 1.0, 3.0, 2.0][step], dtype=torch.float64))
            pl_module.log("val/reward", torch.tensor([0.0, 1.0, 2.0, 3.0][step], dtype=torch.float64))

    module = make_saving_module(eval_rewards={"light": Brightness(), "sharp": Sharpness()})
    module.validation_step = lambda prompts, batch_idx: None
    callback, thetas = LoRAExport(monitor), Thetas()
    options = {"max_steps": 3, "val_check_interval": 1, "num_sanity_val_steps": 0}
    make_trainer(thetas, callback, Score(), **options).fit(module, data)
    best = 3 if monitor == "val/reward" else 2
    assert (callback.best_step, callback.best_metric) == (best, monitor or "val/light")
    assert theta_of(callback.best_path) == thetas.at[best]


def test_metric_that_is_not_logged_is_rejected(make_saving_module, make_trainer, data):
    trainer = make_trainer(LoRAExport("val/taste"), max_steps=1, val_check_interval=1, num_sanity_val_steps=0)
    with pytest.raises(
        ConfigurationError, match="LoRAExport: monitor='val/taste' is not a metric.*write one of val/gain, val/"
    ):
        trainer.fit(make_saving_module(), data)


def test_header_contains_no_password_of_a_url():
    service = SimpleNamespace(url="https://me:secret@example.org:8000/score?key=secret", retries=3)
    assert "secret" not in describe(service)


def test_header_names_the_weights_of_a_reward_and_the_rewards_that_it_is_computed_from():
    judge = ImageQuality("emoji64-judge", bounded=False)
    assert describe(judge) == "ImageQuality(pretrained='emoji64-judge', bounded=False, size=64)"
    assert describe(Relative(Brightness(), "good", "bad")) == (
        "Relative(positive='good', negative='bad', k=0.0, reward=Brightness(target=0.5))"
    )
    weighted = WeightedSum({"light": WeightedReward(Brightness()), "clean": WeightedReward(judge, weight=0.5)})
    assert describe(weighted) == f"WeightedSum(light=Brightness(target=0.5), clean=0.5 * {describe(judge)})"


def test_files_have_the_permissions_of_the_umask(make_saving_module, make_trainer, data):
    callback = LoRAExport()
    make_trainer(callback, max_steps=1).fit(make_saving_module(), data)
    umask = os.umask(0)
    os.umask(umask)
    assert callback.last_path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.filterwarnings("ignore:cannot write")
def test_full_disk_is_a_configuration_error_and_keeps_the_previous_file(
    make_saving_module, make_trainer, data, monkeypatch
):
    """The operating system raises an error when `last.safetensors` is written for the second time."""
    callback, thetas = LoRAExport(every_n_steps=1), Thetas()

    def fsync(handle):
        if thetas.at.keys() >= {2}:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConfigurationError, match="cannot write .*last.safetensors: No space left"):
        make_trainer(thetas, callback, max_steps=3, limit_val_batches=0).fit(make_saving_module(), data)
    assert theta_of(callback.last_path) == thetas.at[1]
    assert [path.name for path in callback.last_path.parent.iterdir()] == ["last.safetensors"]


def test_average_is_exported_if_the_run_has_one(run):
    ema = AdapterEMA(0.5, warmup=False)
    callback, thetas = run([0.1, 0.2, 0.3], LoRAExport(), ema)
    average = 0.1
    for step in (1, 2, 3):
        average = 0.5 * average + 0.5 * thetas[step]
    assert theta_of(callback.last_path) == pytest.approx(average, rel=1e-12)
    assert theta_of(callback.last_path) != thetas[3]


def test_interrupted_run_exports_its_last_adapters(make_saving_module, make_trainer, data):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("power cut")

    thetas, callback = Thetas(), LoRAExport()
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(thetas, callback, Interrupt()).fit(make_saving_module(), data)
    assert theta_of(callback.last_path) == thetas.at[2]
    assert not callback.best_path.exists()


def test_adapters_that_are_not_finite_are_not_written(make_saving_module, make_trainer, data):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                pl_module.model.theta.data.fill_(math.nan)

    thetas, callback = Thetas(), LoRAExport(every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite at step 3: they are not exported"):
        make_trainer(Break(), thetas, callback, max_steps=3, limit_val_batches=0).fit(make_saving_module(), data)
    assert theta_of(callback.last_path) == thetas.at[2]


def test_resumed_run_compares_with_the_best_score_before(make_trainer, make_module, data, tmp_path):
    """The best adapters before the resume remain the best, and their file is copied to the new folder."""

    def fit(callback, thetas, saver, **options):
        module = scripted({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4}, reward=make_module().reward)
        trainer = make_trainer(
            callback,
            thetas,
            saver,
            val_check_interval=1,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
            max_steps=options.pop("max_steps"),
        )
        trainer.fit(module, copy.deepcopy(data), **options)

    first, thetas = LoRAExport(dirpath=str(tmp_path / "first")), Thetas()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(first, thetas, saver, max_steps=3)
    second = LoRAExport(dirpath=str(tmp_path / "second"))
    fit(second, Thetas(), saver, max_steps=4, ckpt_path=tmp_path / "step=3.ckpt")
    assert (second.best_step, second.best_score) == (2, 0.9)
    assert theta_of(second.best_path) == thetas.at[2]
    assert second.best_path.parent == tmp_path / "second"
    assert header_of(second.last_path)["step"] == "4"


class Rank(Saving):
    """Records which process wrote."""

    rank = 0

    def save_lora(self, path, metadata=None):
        super().save_lora(path, metadata)
        (Path(path).parent / f"written-by-{self.rank}").touch()


class TellRank(Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.model.rank = trainer.global_rank


def test_only_one_of_two_processes_writes(make_saving_module, make_trainer, data, tmp_path):
    trainer = make_trainer(
        TellRank(), LoRAExport(dirpath=str(tmp_path / "lora")), max_steps=2, strategy="ddp_fork", devices=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(make_saving_module(model=Rank(0.1)), data)
    names = sorted(path.name for path in (tmp_path / "lora").iterdir())
    assert names == ["best.safetensors", "last.safetensors", "written-by-0"]


def test_model_without_save_lora_is_rejected(make_module, make_trainer, data):
    with pytest.raises(ConfigurationError, match="has no save_lora"):
        make_trainer(LoRAExport()).fit(make_module(), data)


def test_invalid_arguments_are_rejected():
    with pytest.raises(ConfigurationError, match="write one of max, min"):
        LoRAExport(mode="best")
    with pytest.raises(ConfigurationError, match="at least 1"):
        LoRAExport(every_n_steps=0)
    with pytest.raises(ConfigurationError, match="give it a dirpath"):
        _ = LoRAExport().last_path


class OneProcess:
    is_global_zero = True


def test_the_best_file_or_pipeline_of_a_resumed_run_is_copied_into_another_folder(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "best" / "unet").mkdir(parents=True)
    (old / "best" / "unet" / "config.json").write_text("{}")
    (old / "guarded.safetensors").write_text("adapters")
    for name in ("best", "guarded", "last"):
        copy_from_resumed_run(OneProcess(), old, new / f"{name}.safetensors")
        copy_from_resumed_run(OneProcess(), old, old / f"{name}.safetensors")
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == {
        "best/unet/config.json",
        "guarded.safetensors",
    }
