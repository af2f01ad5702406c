"""Stop training when the cluster's scheduler announces the end of a job, and requeue the job."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_draft.callbacks import LastCheckpoint
from lightning_draft.cli.messages import print_error

_LIMIT_S = 60


class Preemption(Callback):
    """End training after the current step on SIGUSR1, so that the last checkpoint is written.

    With several processes, the signal may arrive at any of them: all end at the same step.

    SLURM sends the signal with `#SBATCH --signal=USR1@120`. The same command line with `--resume auto` continues.

    Attributes:
        requested: Whether the signal has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._trainer: Trainer | None = None

    @contextmanager
    def handle_signal(self) -> Iterator[None]:
        """Within this context, SIGUSR1 ends training after a step; Lightning's handler would save within a step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the first step if the signal arrived before training."""
        self._trainer = trainer
        if self.requested:
            self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the reference to the trainer."""
        self._trainer = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._trainer is not None:
            self._stop(self._trainer)

    def _stop(self, trainer: Any) -> None:
        checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)]
        if trainer.world_size > 1 and checkpoints:
            checkpoints[0].stop_together()
        else:
            trainer._signal_connector.received_sigterm = True  # read after each training step


def requeue() -> bool:
    """Requeue this job with SLURM; return whether that succeeded.

    The id of a job in an array consists of the array and the task, such as `12_3`.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode != 0:
        print_error(f"scontrol requeue {job} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.returncode == 0
