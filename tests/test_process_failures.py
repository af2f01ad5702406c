"""If one of two processes is stopped or killed or fails, both end soon and the last checkpoint remains."""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script

from lightning_draft.callbacks import LastCheckpoint, LoRAExport
from lightning_draft.callbacks.interruption import Interruption
from lightning_draft.cli.preemption import Preemption
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.rewards import PythonFunction
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM

STEP = 2
LIMIT_S = 60.0
PATIENCE_S = 3.0  # 45 s outside tests
TIME_LIMIT_S = 1.0


class Fault(L.Callback):
    """Calls a function for each rank after `STEP` steps."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions = actions

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STEP and trainer.global_rank in self.actions:
            self.actions[trainer.global_rank]()


def error() -> None:
    raise RuntimeError("this process fails")


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def endless_reward() -> None:
    """A reward with a time limit that never returns."""
    PythonFunction(lambda images, prompts: time.sleep(3600), time_limit=TIME_LIMIT_S)(
        torch.zeros(1, 3, 4, 4), ["a cat"]
    )


FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    "SIGINT": (send(signal.SIGINT), ""),
    "SIGTERM": (send(signal.SIGTERM), ""),
    "SIGKILL": (send(signal.SIGKILL), ""),
    "exception": (error, "RuntimeError: this process fails"),
    "endless reward": (endless_reward, "did not return within time_limit=1 s"),
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
}


@pytest.fixture(scope="module")
def module(tiny_sd_v: Path) -> DraftModule:
    """Built once; each process trains its own copy."""
    model = StableDiffusion(str(tiny_sd_v), lora=LoRA(rank=1, target_modules=["to_q"], seed=0))
    return DraftModule(model, Brightness(), DDIM(2))


def train(
    rank: int, root: Path, module: DraftModule, strategy: str, *callbacks: L.Callback, every_n_steps: int = 1
) -> None:
    checkpoint = LastCheckpoint(every_n_steps)
    checkpoint._interruption = Interruption(PATIENCE_S)
    trainer = L.Trainer(
        strategy=STRATEGIES[strategy](),
        accelerator="cpu",
        devices=2,
        max_steps=10_000,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[*callbacks, LoRAExport(every_n_steps=1), checkpoint],
    )
    trainer.fit(module, PromptDataModule([f"a cat {i}" for i in range(8)], batch_size=1, val_size=2))


def train_preemptible(rank: int, root: Path, module: DraftModule, fault: Fault) -> None:
    """Train as the command line does, without checkpoints in between."""
    preemption = Preemption()
    with preemption.handle_signal():
        train(rank, root, module, "ddp", fault, preemption, every_n_steps=100)


def start(root: Path, work: Callable[..., None], *args: Any) -> list[int]:
    """Call `work(rank, root, ...)` in two processes as torchrun does, and return their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
        work(rank, root, *args)

    return [os.fork() or run_child(root / f"{rank}.txt", partial(process, rank)) for rank in range(2)]


def run_child(log: Path, work: Callable[[], None]) -> int:
    """Run `work` in this process with its output in a file, and end the process."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(processes: list[int]) -> list[int]:
    """Wait until processes have ended, and return their exit statuses; it is an error if that takes too long."""
    started, statuses = time.monotonic(), {}
    while len(statuses) < len(processes) and time.monotonic() < started + LIMIT_S:
        for process in processes:
            finished, status = os.waitpid(process, os.WNOHANG) if process not in statuses else (0, 0)
            if finished:
                statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    running = set(processes) - statuses.keys()
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert not running, f"a process still runs after {LIMIT_S:g} s"
    return [statuses[process] for process in processes]


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("fsdp2", 0)])
@pytest.mark.parametrize("fault", FAULTS)
def test_all_processes_end_if_one_ends(
    fault: str, rank: int, strategy: str, tmp_path: Path, module: DraftModule
) -> None:
    action, message = FAULTS[fault]
    statuses = wait_for(start(tmp_path, train, module, strategy, Fault({rank: action})))
    assert 0 not in statuses
    assert message in (tmp_path / f"{rank}.txt").read_text()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    stopped_together = fault in ("SIGINT", "SIGTERM")
    assert saved["global_step"] == STEP + stopped_together
    assert (tmp_path / "lora" / "last.safetensors").is_file()
    if fault == "SIGKILL":
        assert statuses[rank] == -signal.SIGKILL


def test_the_signal_before_a_job_ends_writes_a_checkpoint(tmp_path: Path, module: DraftModule) -> None:
    """SIGUSR1 to one of the processes, twice, stops both."""

    def send_twice() -> None:
        for _ in range(2):
            send(signal.SIGUSR1)()

    statuses = wait_for(start(tmp_path, train_preemptible, module, Fault({1: send_twice})))
    assert 0 not in statuses
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEP + 1


def test_process_that_waits_for_an_unresponsive_one_ends_soon_after_a_signal(
    tmp_path: Path, module: DraftModule
) -> None:
    """The process waits in C++ code, where no Python signal handler runs."""

    def terminate_later() -> None:
        threading.Timer(0.5, send(signal.SIGTERM)).start()

    fault = Fault({0: terminate_later, 1: send(signal.SIGSTOP)})
    processes = start(tmp_path, train, module, "ddp", fault)
    statuses = wait_for(processes[:1])
    os.kill(processes[1], signal.SIGKILL)
    os.waitpid(processes[1], 0)
    assert statuses == [128 + signal.SIGTERM]
    assert "the processes did not stop together within 3 s after SIGTERM" in (tmp_path / "0.txt").read_text()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEP


class Forked:
    """Replaces `subprocess.Popen` in Lightning's launcher by a fork of this process, which has imported all modules."""

    def __init__(self, command: list[str], env: dict[str, str], work: Callable[[], None], log: Path, **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env)
            run_child(log, work)

    def poll(self) -> int | None:
        if self.returncode is None:
            finished, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if finished else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def launch(root: Path, module: DraftModule, fault: Fault) -> None:
    """Train in two processes; this one starts the other with Lightning's launcher."""
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    other = partial(train, 1, root, module, "ddp", fault)
    subprocess_script.subprocess.Popen = partial(Forked, work=other, log=root / "1.txt")
    train(0, root, module, "ddp", fault)


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGINT"])
def test_process_ends_with_its_launcher(fault: str, tmp_path: Path, module: DraftModule) -> None:
    reading, writing = os.pipe()  # closed at its writing end when all processes have ended
    launcher = os.fork() or run_child(
        tmp_path / "0.txt", partial(launch, tmp_path, module, Fault({0: FAULTS[fault][0]}))
    )
    os.close(writing)
    (status,) = wait_for([launcher])
    assert status != 0
    assert select.select([reading], [], [], LIMIT_S) == ([reading], [], [])
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= STEP
