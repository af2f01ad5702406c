"""Random states in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from lightning_draft.callbacks.step_state import StepState
from lightning_draft.distributed import all_gather_objects, world_size


class RandomState(StepState):
    """Save and restore the random states of Python, NumPy and torch with every checkpoint, for each process.

    `DraftModule` and `PromptLoader` do not need this callback: the noise comes from their own seeds, and the loader
    saves its position. It is for modules, data sets and rewards that use the global generators. A run that is resumed
    between two epochs equals the uninterrupted run, including the order of a shuffling data loader. Within an epoch the
    steps use the same random numbers, but the data loader must restore the order of the remaining data itself.

    Example:
        ```python
        trainer = Trainer(max_epochs=3, callbacks=[RandomState(), LastCheckpoint()])
        ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._restored: list[dict[str, Any]] | None = None
        self._between_epochs = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore a state saved between epochs before the data loader shuffles the next one."""
        if self._between_epochs:
            self._restore()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Restore a state saved within an epoch after the data loader has created its iterator."""
        self._restore()
        super().on_train_batch_start(trainer, pl_module)
        self._between_epochs = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Record that a checkpoint written after the last batch of an epoch is between epochs."""
        self._between_epochs = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the state before the data loader shuffles the next epoch."""
        self._step_state = trainer.global_step, self.own_state()

    def own_state(self) -> dict[str, Any]:
        """Return the states of this process's generators."""
        return {"process": get_random_state(), "between_epochs": self._between_epochs}

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the states of all processes, by rank."""
        return {"processes": all_gather_objects(state["process"]), "between_epochs": state["between_epochs"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes, by rank."""
        return self.gather_state(self.own_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the states until training continues."""
        self._restored = state_dict["processes"]
        self._between_epochs = state_dict["between_epochs"]

    def _restore(self) -> None:
        states, self._restored = self._restored, None
        if states is None:
            return
        if len(states) != world_size():
            rank_zero_warn(
                f"the checkpoint contains the random states of {len(states)} processes and there are {world_size()} "
                "now: they are not restored, and this run will differ from an uninterrupted one"
            )
            return
        set_random_state(states[dist.get_rank() if world_size() > 1 else 0])


def get_random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch and the accelerators as plain values."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(algorithm), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
