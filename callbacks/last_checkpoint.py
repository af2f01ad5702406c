"""The checkpoint that a run is resumed from."""

from __future__ import annotations

import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_draft.arguments import integer_at_least
from lightning_draft.callbacks.checkpoint_io import AtomicCheckpointIO, recover_checkpoint, write_checkpoint
from lightning_draft.callbacks.common import run_folder
from lightning_draft.callbacks.ema import restore_trained
from lightning_draft.callbacks.finished_step import GRADIENT_NORM, FinishedStep
from lightning_draft.callbacks.interruption import Interruption
from lightning_draft.callbacks.logged_values import StepLog, save_loggers
from lightning_draft.callbacks.position import (
    get_position,
    hold_validation,
    next_epoch,
    raise_limits,
    set_limits,
    validation_is_due,
)
from lightning_draft.callbacks.step_state import callback_states
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.files import remove_partial_files
from lightning_draft.methods.base import RewardModule
from lightning_draft.parameter_gradients import gradient_scaler


class LastCheckpoint(Checkpoint):
    """Keep one checkpoint, `last.ckpt`, from which a resumed run gives the same result as an uninterrupted one.

    The checkpoint is written every `every_n_steps` optimization steps, again after the validation of such a step, at
    the end of training, and when training is stopped by Ctrl-C, SIGTERM or an error. It always contains the state at
    the end of an optimization step. An interrupted step and an interrupted validation are repeated after the resume.
    The new file replaces the old one only when it is complete and on the disk. A step whose loss or gradient norm is
    not finite is not saved, and nothing is saved if `GradientNormMonitor` stops the run.

    Note:
        With several processes, Ctrl-C or SIGTERM to any of them stops all processes at the end of a step, and the
        checkpoint is written. If one process fails, the last checkpoint remains, because all processes are needed to
        write a new one. To keep checkpoints by score, add Lightning's `ModelCheckpoint` to the Trainer's callbacks.

    Example:
        ```python
        trainer = Trainer(max_steps=1000, callbacks=[LastCheckpoint(every_n_steps=50, dirpath="checkpoints")])
        trainer.fit(module, data, ckpt_path="checkpoints/last.ckpt" if resume else None)
        ```

    Args:
        every_n_steps: Optimization steps between two checkpoints.
        dirpath: Folder of the checkpoint; by default `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 100, dirpath: str | None = None) -> None:
        self.every_n_steps = integer_at_least("LastCheckpoint: every_n_steps", every_n_steps, 1)
        self.dirpath = dirpath
        self._path: Path | None = None
        self._saved = -1
        self._finished: FinishedStep | None = None
        self._updating = False
        self._saving = False
        self._ended = False
        self._loaded: dict[str, Any] = {}
        self._limits: tuple[int, int | None] | None = None
        self._interruption = Interruption()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder, make checkpoints atomic, and remove temporary files of a killed process."""
        if stage != "fit":
            return
        folder = run_folder(trainer, self.dirpath, "checkpoints")
        self._path = folder / "last.ckpt"
        self._saved = -1
        self._finished = None
        self._updating = self._saving = self._ended = False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            recover_checkpoint(self._path)
            remove_partial_files(folder)
        others = [callback for callback in trainer.callbacks if not isinstance(callback, _SaveFirst)]  # type: ignore[attr-defined]
        trainer.callbacks = [_SaveFirst(self), *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the validation that the interrupted run did not finish."""
        self._saved = trainer.global_step
        loaded, self._loaded = self._loaded, {}
        if loaded.get("step") == trainer.global_step:
            metrics = {name: torch.tensor(value) for name, value in loaded["metrics"].items()}
            trainer.callback_metrics.update(metrics)
            due = loaded["validation_due"] and trainer.enable_validation
            log = StepLog(*loaded["log"])
            log.repeat(trainer)
            self._finished = FinishedStep(trainer.global_step, loaded["position"], due, metrics, log=log)
            if due:
                hold_validation(trainer, self._finished.epoch)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop at the end of this step if a process received a signal."""
        self._interruption.synchronize(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Delay Ctrl-C until the optimization step and its bookkeeping are complete."""
        self._updating = True
        self._interruption.hold()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the position of the run after each optimization step, and save every `every_n_steps`."""
        if self._finished is None or self._finished.step != trainer.global_step:
            loss = outputs.get("loss") if isinstance(outputs, dict) else None
            self._finished = FinishedStep(
                trainer.global_step,
                get_position(trainer),
                validation_is_due(trainer),
                _metrics(trainer),
                loss,
                StepLog.current(trainer),
            )
        self._updating = False
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
        self._interruption.release()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the checkpoint again with the results of the validation, if the step is already saved."""
        finished = self._finished
        if trainer.state.fn != "fit" or finished is None or finished.step != trainer.global_step:
            return
        self._interruption.hold()
        if isinstance(pl_module, RewardModule):
            pl_module.finish_validation()
        self._finished = replace(finished, validation_due=False, metrics=_metrics(trainer), callbacks={})
        if finished.validation_due and self._saved == trainer.global_step:
            self._saved = -1
            self.save(trainer)
        self._interruption.release()

    def keep_callback_states(self, trainer: L.Trainer) -> None:
        """Keep the states before a validation, because an interrupted one changes the states of only some callbacks."""
        finished = self._finished
        if trainer.state.fn == "fit" and finished is not None and finished.step == trainer.global_step:
            self._finished = replace(finished, callbacks=callback_states(trainer, self))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state at the end of training."""
        self._interruption.uninstall()
        self._ended = True
        self._saved = -1
        self.save(trainer)

    def stop_together(self) -> None:
        """Stop all of several processes before the next step, with a checkpoint, as after SIGTERM to any of them."""
        self._interruption.request(signal.SIGTERM)

    def begin(self, trainer: L.Trainer) -> None:
        """Install the signal handlers, and restore `max_steps` and `max_epochs`.

        The limits were raised so that Lightning starts and ends training again: a run that was interrupted after its
        last step must still validate, sample and write its files.
        """
        if self._limits is not None:
            set_limits(trainer, *self._limits)
        self._limits = None
        self._interruption.install(trainer)

    def save_interrupted(self, trainer: L.Trainer, exception: BaseException) -> None:
        """Save the last finished step when training is interrupted, if no other process is needed for it."""
        self._interruption.uninstall()
        unfinished = self._updating or self._finished is None or self._finished.step != trainer.global_step
        alone = trainer.world_size == 1 or self._interruption.agreed
        if unfinished or not alone or isinstance(exception, DivergenceError):
            return
        try:
            self.save(trainer)
        except ConfigurationError as error:
            rank_zero_warn(f"{error}; the previous checkpoint remains the last one")

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the run."""
        finished = self._finished
        if finished is None:
            return {name: value for name, value in self._loaded.items() if name != "position"}
        return {
            "step": finished.step,
            "validation_due": finished.validation_due,
            "metrics": {name: float(value) for name, value in finished.metrics.items()},
            "log": finished.log.state(),
            "ended": self._ended,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the position until training starts."""
        self._loaded = {**state_dict, "position": self._loaded.get("position", {})}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the position after the last finished step, so that the batch of an interrupted step is used again."""
        if not self._saving or self._finished is None:
            checkpoint["callbacks"].pop(self.state_key, None)
        else:
            checkpoint["callbacks"].update(self._finished.callbacks)
            checkpoint["loops"]["fit_loop"] = self._finished.position
            checkpoint["epoch"] = self._finished.epoch

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue with the next epoch if the checkpoint was written after the last batch of an epoch."""
        loops = checkpoint.get("loops", {})
        if self.state_key in checkpoint.get("callbacks", {}) and "fit_loop" in loops:
            self._loaded = {"position": deepcopy(loops["fit_loop"])}
            loops["fit_loop"] = next_epoch(loops["fit_loop"])
            if trainer.state.fn == "fit" and not checkpoint["callbacks"][self.state_key]["ended"]:
                self._limits = trainer.max_steps, trainer.max_epochs
                raise_limits(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the last finished step, unless it is already written or is not finite."""
        finished = self._finished
        if self._path is None or finished is None or finished.step in (self._saved, 0):
            return
        if not finished.is_finite:
            rank_zero_warn(
                f"the loss or the gradient norm is not finite at step {finished.step}: no checkpoint is written, and "
                f"{self._path} is kept"
            )
            return
        self._saving = True
        try:
            save_loggers(trainer)
            write_checkpoint(trainer, self._path)
        finally:
            self._saving = False
        self._saved = finished.step


class _SaveFirst(Callback):
    """The hooks of `LastCheckpoint` that must run before those of the other callbacks."""

    def __init__(self, checkpoint: LastCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, before other callbacks evaluate the base model."""
        self.checkpoint.begin(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the callbacks' states."""
        self.checkpoint.keep_callback_states(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save a checkpoint with the trained parameters instead of their average."""
        restore_trained(trainer, pl_module)
        self.checkpoint.save_interrupted(trainer, exception)


def _metrics(trainer: L.Trainer) -> dict[str, Tensor]:
    """Return the Trainer's metrics without gradient norms if a gradient scaler may have made them infinite."""
    left_out = None if gradient_scaler(trainer) is None else GRADIENT_NORM
    return {name: value for name, value in trainer.callback_metrics.items() if name != left_out}
