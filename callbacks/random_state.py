"""Random states: leave them as they were, and carry them through checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn


class RandomState(Callback):
    """Save and restore the random states of python, numpy and torch with every checkpoint, for each process.

    `DraftModule` draws its noise from seeds of its own, and `PromptLoader` keeps its place: they resume exactly without
    help. This is for modules, data sets and rewards that draw from the global generators. A run of whole epochs
    (`max_epochs`) that resumes between two of them equals the uninterrupted one, the order of a shuffling data loader
    included. Within an epoch the steps draw the same numbers, but the order of the remaining data is the loader's to
    keep.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._between_epochs = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore a state saved between epochs before the data loader shuffles the next one."""
        if self._between_epochs:
            self._restore()

    def on_train_batch_start(self, *_: Any) -> None:
        """Restore a state saved within an epoch after the data loader has made its iterator anew."""
        self._restore()
        self._between_epochs = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a checkpoint now lies between epochs."""
        self._between_epochs = True

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, by rank."""
        states = [get_random_state()]
        if dist.is_available() and dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, get_random_state())
        return {"processes": states, "between_epochs": self._between_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training goes on."""
        self._restored = state_dict["processes"]
        self._between_epochs = state_dict["between_epochs"]

    def _restore(self) -> None:
        states, self._restored = self._restored, None
        if states is None:
            return
        distributed = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        if len(states) != size:
            rank_zero_warn(
                f"the checkpoint holds the random states of {len(states)} processes and there are {size} now: they are "
                "not restored, and this run will differ from the uninterrupted one"
            )
            return
        set_random_state(states[rank])


def get_random_state() -> dict[str, Any]:
    """The states of python's, numpy's, torch's and the accelerators' generators, in types that any checkpoint holds."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(algorithm), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def observing(pl_module: L.LightningModule) -> Iterator[None]:
    """Within this context a callback may look at the module: no graph, eval mode.

    Random states and the mode of every submodule are as before afterwards.
    """
    state = get_random_state()
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        set_random_state(state)
