"""Read and set the position of Lightning's training loop.

Lightning documents neither the attributes of its loops nor their state in checkpoints;
`tests/callbacks/test_position.py` compares all assumptions about them with the Trainer.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import lightning as L


def validation_is_due(trainer: L.Trainer) -> bool:
    """Return whether Lightning will validate after the batch that has just ended.

    If `val_check_interval` is a duration, this cannot be known in advance, and the result is true.
    """
    loop, interval, epochs = trainer.fit_loop.epoch_loop, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    if interval is None or (trainer.should_stop and _may_stop(trainer)):
        return True
    if interval < math.inf:
        batch = loop.total_batch_idx if epochs is None else loop.batch_idx
        return (batch + 1) % interval == 0
    limit = trainer.limit_train_batches
    return loop.batch_progress.is_last_batch or (isinstance(limit, int) and (loop.batch_idx + 1) % limit == 0)


def _may_stop(trainer: L.Trainer) -> bool:
    """Return whether `min_steps` and `min_epochs` are reached."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return trainer.global_step >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)


def get_position(trainer: L.Trainer) -> dict[str, Any]:
    """Return a copy of the training loop's state, without counts of validation batches.

    Lightning needs these only to continue an interrupted validation, which is repeated as a whole.
    """
    position = deepcopy(trainer.fit_loop.state_dict())
    progress = position["epoch_loop.val_loop.batch_progress"]
    progress["is_last_batch"] = False
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts, 0))
    return position


def set_limits(trainer: L.Trainer, max_steps: int, max_epochs: int | None) -> None:
    """Set the number of optimization steps and epochs of training."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    trainer.fit_loop.max_epochs = max_epochs


def hold_validation(trainer: L.Trainer, epoch: int) -> None:
    """Run the validation that Lightning runs after a training step of `epoch`, which may be the previous epoch.

    Lightning itself counts the validation of the step that it resumes from, so its batches are not counted here.
    """
    progress, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.val_loop
    current, progress.completed = progress.completed, epoch
    counted = loop.batch_progress.state_dict()
    restarting, loop.restarting = loop.restarting, False  # else the batches of the last validation are skipped
    trainer.validating = True
    loop.run()
    trainer.training = True
    loop.restarting = restarting
    loop.batch_progress.load_state_dict(counted)
    progress.completed = current


def next_epoch(position: dict[str, Any]) -> dict[str, Any]:
    """Return the start of the next epoch if a position is after the last batch of an epoch, else the position.

    Lightning does not count the epoch of such a position as finished.
    """
    if not position["epoch_loop.batch_progress"]["is_last_batch"]:
        return position
    moved = deepcopy(position)
    moved["epoch_loop.batch_progress"]["is_last_batch"] = False
    for counts in moved["epoch_progress"].values():
        finished = counts["ready"]
        counts.update(ready=finished + 1, started=finished + 1, processed=finished, completed=finished)
    return moved


def raise_limits(trainer: L.Trainer) -> None:
    """Raise the limits of optimization steps and epochs by one."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    set_limits(trainer, steps if steps == -1 else steps + 1, epochs if epochs in (None, -1) else epochs + 1)
