"""Runs that are resumed, interrupted or fail."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


def test_resumed_run_equals_uninterrupted_run(command: Callable, config: Path) -> None:
    command("fit", "--config", config, "--trainer.max_steps", "4", "--name", "whole")
    command("fit", "--config", config, "--name", "parts")
    resumed = command("fit", "--config", config, "--name", "parts", "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert resumed.status == 0, resumed.err
    assert {path.name for path in Path("runs").iterdir()} == {"whole", "parts"}
    whole, parts = (torch.load(Path("runs") / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 4
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name])
    for index, state in whole["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg"], parts["optimizer_states"][0]["state"][index]["exp_avg"])
    assert yaml.safe_load(Path("runs/parts/config.yaml").read_text())["ckpt_path"] is None


def test_checkpoint_does_not_override_command_line_options(command: Callable, trained: Path) -> None:
    checkpoint = torch.load("runs/small/checkpoints/last.ckpt")
    checkpoint["hyper_parameters"] = {"seed": 77, "kl_weight": 5.0}
    torch.save(checkpoint, "mine.ckpt")
    args = ["--ckpt_path", "mine.ckpt", "--name", "typed", "--model.seed", "3", "--trainer.max_steps", "3"]
    assert command("fit", "--config", trained, *args).status == 0
    saved = yaml.safe_load(Path("runs/typed/config.yaml").read_text())["model"]["init_args"]
    assert (saved["seed"], saved["kl_weight"]) == (3, 0.0)


def test_last_is_the_newest_run_with_the_name_or_the_given_one(command: Callable, trained: Path) -> None:
    shutil.copytree("runs/small", "runs/small-2", copy_function=shutil.copyfile)
    steps = ["--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert "run folder: runs/small-2 " in command("fit", "--config", trained, *steps).out
    assert "run folder: runs/small " in command("fit", "--config", "runs/small", *steps).out


def test_error_in_training_gives_exit_status_1(command: Callable, config: Path) -> None:
    Path("exploding.py").write_text(
        "import lightning as L\n"
        "class Explode(L.Callback):\n"
        "    def on_after_backward(self, trainer, pl_module):\n"
        "        for parameter in pl_module.trainable_parameters().values():\n"
        "            parameter.grad.fill_(float('inf'))\n"
    )
    options = ["--trainer.callbacks", "[exploding.Explode]", "--gradients", "null", "--trainer.max_steps", "20"]
    result = command("fit", "--config", config, *options)
    assert result.status == 1, result.err
    assert "training failed: the gradient was not finite in 10 optimizer steps in a row" in result.err


def test_ctrl_c_before_the_first_step_prints_one_message(command: Callable, config: Path) -> None:
    Path("pressing.py").write_text(
        "import lightning as L\n"
        "class Press(L.Callback):\n"
        "    def setup(self, trainer, *_, **__):\n"
        "        raise KeyboardInterrupt\n"
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        result = command("fit", "--config", config, "--trainer.callbacks", "[pressing.Press]")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == 130
    assert result.err.splitlines()[-1] == "lightning-draft: stopped by Ctrl-C after 0 steps"
    assert not Path("runs").exists()


def test_run_interrupted_by_ctrl_c_keeps_its_files_and_resumes(command: Callable, config: Path) -> None:
    """Ctrl-C is pressed within a step, after its batch was loaded; the resumed run equals an uninterrupted one."""
    Path("pressing.py").write_text(
        "import lightning as L\n"
        "class Press(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 2:\n"
        "            raise KeyboardInterrupt\n"
    )
    options = ["--trainer.max_steps", "4", "--trainer.accumulate_grad_batches", "2", "--model.sampler.eta", "1"]
    before = signal.getsignal(signal.SIGINT)
    try:
        pressed = command("fit", "--config", config, *options, "--trainer.callbacks", "[pressing.Press]")
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed.status == 130
    assert "stopped by Ctrl-C after 2 steps" in pressed.err
    assert "lightning-draft fit --config runs/small --ckpt_path last" in pressed.out
    assert Path("runs/small/lora/last.safetensors").is_file()
    resumed = command("fit", "--config", config, *options, "--ckpt_path", "last", "--name", "small")
    assert resumed.status == 0, resumed.err
    assert command("fit", "--config", config, *options, "--name", "whole").status == 0
    small, whole = (torch.load(Path("runs") / name / "checkpoints/last.ckpt") for name in ("small", "whole"))
    assert small["global_step"] == whole["global_step"] == 4
    assert _place(small) == _place(whole) == 8
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, small["state_dict"][name])
    for index, state in whole["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg"], small["optimizer_states"][0]["state"][index]["exp_avg"])


def test_failed_or_terminated_run_keeps_its_checkpoint(command: Callable, config: Path) -> None:
    Path("failing.py").write_text(
        "import lightning as L, os, signal\n"
        "class Fail(L.Callback):\n"
        "    def on_before_backward(self, trainer, *_):\n"
        "        if trainer.global_step == 2:\n"
        "            raise ConnectionError('the service is down')\n"
        "class Terminate(L.Callback):\n"
        "    def on_before_backward(self, trainer, *_):\n"
        "        if trainer.global_step == 2:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    options = ["fit", "--config", config, "--trainer.max_steps", "4", "--trainer.callbacks"]
    with pytest.raises(ConnectionError, match="the service is down"):
        command(*options, "[failing.Fail]")
    saved = torch.load("runs/small/checkpoints/last.ckpt")
    assert saved["global_step"] == _place(saved) == 2
    ended = command(*options, "[failing.Terminate]")
    assert ended.status == 143
    assert "stopped by SIGTERM after 3 steps" in ended.err
    saved = torch.load("runs/small-2/checkpoints/last.ckpt")
    assert saved["global_step"] == _place(saved) == 3


def _place(checkpoint: dict[str, Any]) -> int:
    """The number of used batches."""
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"]


def test_folder_as_ckpt_path_means_its_newest_checkpoint(command: Callable, trained: Path) -> None:
    args = ["fit", "--config", trained, "--name", "more", "--trainer.max_steps", "3", "--trainer.logger", "CSVLogger"]
    result = command(*args, "--trainer.logger.save_dir", "csv", "--ckpt_path", "runs/small")
    assert result.status == 0, result.err
    assert "step 3/3" in result.out
    assert "tensorboard" not in result.out
    assert list(Path("csv").rglob("metrics.csv"))
    assert Path("runs/more/config.yaml").is_file()
