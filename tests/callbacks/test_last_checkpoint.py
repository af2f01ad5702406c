"""A run that is stopped at any point and resumed equals the uninterrupted run in every state and file."""

import copy
import errno
import os
import shutil
import signal
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_draft.advantages import PerPromptStatistics
from lightning_draft.callbacks import (
    AdapterEMA,
    GradientNormMonitor,
    LastCheckpoint,
    LoRAExport,
    OverOptimizationGuard,
    RandomState,
    SampleLogger,
)
from lightning_draft.callbacks.step_state import StepState
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.rewards import Brightness, Sharpness
from lightning_draft.rewards.combine import WeightedReward, ZScoreSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward

STEPS = 6
PROMPTS = [f"prompt {i}" for i in range(8)]


class Saving(LinearModel):
    """A linear model that saves its parameter as adapters."""

    def save_lora(self, path, metadata=None):
        save_file({"theta": self.theta.detach().clone()}, path, metadata=dict(metadata or {}))


class Batches(StepState):
    """Counts batches before the backward pass, as a monitor does."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def on_before_backward(self, *_):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


class Stop(Callback):
    """Stops the run once, in a given hook after a number of finished steps, by Ctrl-C, SIGTERM or an error."""

    def __init__(self, how, hook, step):
        self.how, self.step = how, step
        setattr(self, hook, self.act)

    def act(self, trainer, *_):
        if trainer.global_step == self.step and self.how:
            how, self.how = self.how, None
            if how == "error":
                raise RuntimeError("the reward failed")
            for _ in range(1 + (how == "twice")):
                signal.raise_signal(signal.SIGTERM if how == "terminated" else signal.SIGINT)


def callbacks(folder, every=4):
    return [
        SampleLogger(every_n_steps=3, max_samples=1, dirpath=str(folder / "samples")),
        LoRAExport(every_n_steps=3, dirpath=str(folder / "lora")),
        GradientNormMonitor(min_history=2, every_n_steps=1, figure_every_n_steps=0),
        Batches(),
        RandomState(),
        OverOptimizationGuard(max_prompts=1, samples_per_prompt=2, margin=0.0, dirpath=str(folder / "lora")),
        AdapterEMA(0.5),
        LastCheckpoint(every, dirpath=str(folder / "checkpoints")),
    ]


@pytest.fixture
def train(make_module, make_trainer, logger):
    """Train, or resume from a checkpoint if there is one; return all states and files of the run."""

    def fit(folder, *extra, every=4, data=None, **options):
        torch.manual_seed(0)
        reward = ZScoreSum({"light": WeightedReward(Brightness()), "sharp": WeightedReward(Sharpness(), -0.5)})
        module = make_module(model=Saving(0.1), reward=reward, eval_rewards={"bright": Brightness()})
        mine = callbacks(folder, every)
        settings = {"max_steps": STEPS, "check_val_every_n_epoch": None, "val_check_interval": 2}
        trainer = make_trainer(
            *extra, *mine, logger=logger, enable_checkpointing=True, num_sanity_val_steps=0, **{**settings, **options}
        )
        last = folder / "checkpoints" / "last.ckpt"
        prompts = PromptDataModule(PROMPTS, **(data or {"batch_size": 2, "val_size": 2}))
        trainer.fit(module, prompts, ckpt_path=last if last.exists() else None)
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt"]
        return {
            "theta": module.model.theta.item(),
            "reward": module.reward.state_dict(),
            "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()["state"]),
            "callbacks": {type(each).__name__: _portable(each.state_dict()) for each in mine},
            "files": {str(path.relative_to(folder)): content(path) for path in files},
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "logged": {(step, name): value for step, metrics in logger.metrics for name, value in metrics.items()},
        }

    return fit


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["best.safetensors", "guarded.safetensors"])
def test_a_file_that_could_not_be_written_in_a_validation_is_written_after_the_resume(
    train, uninterrupted, tmp_path, monkeypatch, name
):
    def replace(source, target, replace=os.replace):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigurationError, match=f"cannot write .*{name}: No space left"):
        train(tmp_path / "full", every=1)
    monkeypatch.undo()
    resumed = train(tmp_path / "full", every=1)
    for key in ("theta", "optimizer", "callbacks", "files", "epoch", "step"):
        assert equal(resumed[key], uninterrupted[key]), key


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_repeated_validation_has_all_its_batches(train, tmp_path, logger):
    """The checkpoint has seen another validation before, whose batches must not be left out."""
    options = {"val_size": 5, "batch_size": 1}
    whole = train(tmp_path / "whole", data=options)
    with pytest.raises(SystemExit):
        train(tmp_path / "killed", Stop("interrupted", "on_validation_batch_start", 4), data=options)
    logger.metrics.clear()
    resumed = train(tmp_path / "killed", data=options)
    validations = [metrics["val/reward"] for _, metrics in logger.of("val/reward")]
    assert validations[0] == whole["logged"][3, "val/reward"]
    assert equal(resumed["callbacks"], whole["callbacks"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_values_of_a_step_are_logged_although_the_run_is_killed_after_its_checkpoint(train, tmp_path, logger):
    with pytest.raises(SystemExit):
        train(tmp_path, Stop("interrupted", "on_train_batch_end", 4))
    assert max(step for step, _ in logger.of("train/reward")) == 2
    train(tmp_path)
    assert [step for step, _ in logger.of("train/reward")] == list(range(STEPS))


def content(path):
    """Return the content of a file; the order of metadata in a safetensors file is arbitrary."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _portable(state):
    """Return a callback's state without the folder that it writes to."""
    return {name: value for name, value in state.items() if name != "folder"}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(ours, theirs):
    """Return the keys of a dictionary whose values differ."""
    if not isinstance(theirs, dict):
        return ours, theirs
    return [key for key in theirs if key not in ours or not equal(ours[key], theirs[key])]


MOMENTS = [
    ("on_train_batch_start", 3),
    ("on_train_batch_start", 4),
    ("on_before_backward", 3),
    ("on_before_optimizer_step", 3),
    ("on_train_batch_end", 3),
    ("on_train_batch_end", 4),
    ("on_validation_start", 4),
    ("on_validation_batch_start", 2),
    ("on_validation_end", 4),
    ("on_validation_end", STEPS),
    ("on_train_epoch_end", 3),
    ("on_train_end", STEPS),
]


@pytest.fixture
def uninterrupted(train, tmp_path, logger):
    result = train(tmp_path / "whole")
    logger.metrics.clear()
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("how", "moments"),
    [
        ("interrupted", MOMENTS),
        ("twice", MOMENTS[::2]),
        ("terminated", MOMENTS[1::2]),
        ("error", MOMENTS[::2]),
    ],
    ids=["interrupted", "twice", "terminated", "error"],
)
def test_resumed_run_equals_uninterrupted_run(train, uninterrupted, tmp_path, how, moments):
    whole = uninterrupted
    assert any(name.startswith("lora/guarded") for name in whole["files"])
    for hook, step in moments:
        folder = tmp_path / f"{hook}-{step}"
        with suppress(SystemExit, RuntimeError):
            train(folder, Stop(how, hook, step))
        resumed = train(folder)
        for name, value in whole.items():
            ours = resumed[name]
            if name == "logged":
                ours = {key: value for key, value in ours.items() if key in whole["logged"]}
            assert equal(ours, value), (hook, step, name, differences(ours, value))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("limits", [{"max_epochs": 3, "max_steps": -1}, {"max_epochs": -1, "max_steps": 9}])
def test_resumed_run_counts_epochs_and_steps_as_uninterrupted_run(train, tmp_path, limits):
    """Epochs have three batches; the run is stopped within an epoch, after one, and after the first batch of one."""
    whole = train(tmp_path / "whole", **limits)
    assert (whole["step"], whole["epoch"]) == (9, 3)
    for step in (2, 3, 4, 8):
        folder = tmp_path / str(step)
        with pytest.raises(SystemExit):
            train(folder, Stop("interrupted", "on_train_batch_end", step), **limits)
        resumed = train(folder, **limits)
        for name in ("step", "epoch", "theta", "optimizer", "files"):
            assert equal(resumed[name], whole[name]), (step, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoint_is_written_if_another_callback_fails_during_interruption(train, tmp_path):
    class Fails(Callback):
        def on_exception(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, Fails(), Stop("error", "on_train_batch_start", 3))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_full_disk_is_a_configuration_error_and_keeps_the_previous_checkpoint(train, tmp_path, monkeypatch):
    saved = []

    def fsync(handle):
        saved.append(handle)
        if len(saved) > 2:  # the second file
            raise OSError(errno.ENOSPC, "No space left on device")

    def without_exports(self, trainer, *_, **__):
        """Disable exports, so that only the checkpoint is written."""

    monkeypatch.setattr(LoRAExport, "export", without_exports)
    monkeypatch.setattr(SampleLogger, "sample", without_exports)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConfigurationError, match="cannot write .*last.ckpt: No space left on device; free some space"):
        train(tmp_path, every=1, limit_val_batches=0)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


class Copy(Callback):
    """Keeps the checkpoint that there is when the step after a number of steps begins."""

    def __init__(self, step, last):
        self.step, self.last = step, last

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            shutil.copyfile(self.last, self.last.with_name("copy.ckpt"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_holds_the_learning_rate_that_follows_its_validation(make_module, make_trainer, data, tmp_path):
    def schedule(optimizer):
        return ReduceLROnPlateau(optimizer, "val/reward", mode="max", factor=0.5, patience=0, threshold=1e9)

    def fit(checkpoint=None):
        last = LastCheckpoint(2, dirpath=str(tmp_path))
        extra = [Copy(4, tmp_path / "last.ckpt")] if checkpoint is None else []
        options = {"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 2, "num_sanity_val_steps": 0}
        trainer = make_trainer(*extra, last, enable_checkpointing=True, **options)
        trainer.fit(make_module(lr_scheduler=schedule), data, ckpt_path=checkpoint)
        return trainer.optimizers[0].param_groups[0]["lr"]

    assert fit() == 0.01 / 4  # after 3 validations, of which the first is the best so far
    saved = torch.load(tmp_path / "copy.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01 / 2
    assert saved["lr_schedulers"][0]["num_bad_epochs"] == 0
    assert fit(tmp_path / "copy.ckpt") == 0.01 / 4


class Explode(Callback):
    """Sets the parameters to infinity after step 3, so that no later gradient is finite."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= 3:
            pl_module.model.theta.grad.fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            pl_module.model.theta.data.fill_(1e6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_diverged_run_ends_with_an_error_and_keeps_the_last_finite_checkpoint(
    make_module, make_trainer, data, tmp_path
):
    last, monitor = LastCheckpoint(1, dirpath=str(tmp_path)), GradientNormMonitor(max_nonfinite=4)
    trainer = make_trainer(Explode(), monitor, last, max_steps=20, enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(DivergenceError, match="not finite in 4 optimizer steps in a row, up to step 6"):
        trainer.fit(make_module(), data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert abs(saved["state_dict"]["model.theta"].item()) < 10


def test_temporary_files_of_killed_processes_are_removed(make_module, make_trainer, data, tmp_path):
    killed = os.fork()
    if killed == 0:
        os._exit(0)
    os.waitpid(killed, 0)
    stale, running = tmp_path / f".last.{killed}.partial.ckpt", tmp_path / f".last.{os.getppid()}.partial.ckpt"
    stale.touch(), running.touch()
    last = LastCheckpoint(dirpath=str(tmp_path))
    make_trainer(last, max_steps=1, enable_checkpointing=True, limit_val_batches=0).fit(make_module(), data)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"last.ckpt", running.name}
    assert not stale.exists()


def test_saving_needs_no_temporary_folder(make_module, make_trainer, data, tmp_path, monkeypatch):
    """`TMPDIR` may be on another disk, from which a file cannot be moved at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", None)
    last = LastCheckpoint(dirpath=str(tmp_path / "run"))
    make_trainer(last, max_steps=1, enable_checkpointing=True, limit_val_batches=0).fit(make_module(), data)
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == ["last.ckpt"]


def test_invalid_interval_is_rejected():
    with pytest.raises(ConfigurationError, match="every_n_steps=0 must be at least 1"):
        LastCheckpoint(0)


class PeakMemory(Callback):
    """Records the most memory that Python allocated in each step but the first, beyond what was there before."""

    def __init__(self):
        self.peaks = []
        self.before = None

    def on_train_batch_start(self, *_):
        now, peak = tracemalloc.get_traced_memory()
        if self.before is not None:
            self.peaks.append(peak - self.before)
        tracemalloc.reset_peak()
        self.before = now


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_memory_of_a_step_does_not_depend_on_the_number_of_prompts(make_trainer, tmp_path):
    def peak(count):
        prompts = [f"prompt {i}" for i in range(count)]
        estimator = PerPromptStatistics(4, 2)
        estimator.load_state_dict({"seen": {prompt: [1.0, 2.0] for prompt in prompts}})
        module = PolicyGradientModule(
            LinearModel(0.1), LinearReward(), DDIM(2, eta=1.0), advantage_estimator=estimator, samples_per_prompt=2
        )
        memory, last = PeakMemory(), LastCheckpoint(dirpath=str(tmp_path / str(count)))
        options = {"max_steps": 8, "limit_val_batches": 0, "enable_checkpointing": True}
        tracemalloc.start()
        make_trainer(memory, last, **options).fit(module, PromptDataModule(prompts, batch_size=2, val_size=2))
        tracemalloc.stop()
        return sorted(memory.peaks)[len(memory.peaks) // 2]

    few, many = peak(50), peak(20_000)
    assert many < few + 50_000  # a pointer to each prompt would take 160,000 bytes
