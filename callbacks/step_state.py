"""Save the callback states of the previous step in checkpoints of an interrupted step."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_map


class StepState(Callback):
    """Base class of callbacks whose state changes in the middle of an optimization step.

    A step that is interrupted before the optimizer has changed the parameters is repeated after a resume. The
    checkpoint must then not contain what a callback has counted or measured in this step, so the state before the step
    is saved. A subclass that overrides one of the two hooks must call `super()`.

    Example:
        ```python
        class BatchCounter(StepState):
            def __init__(self):
                super().__init__()
                self.batches = 0

            def on_before_backward(self, trainer, pl_module, loss):
                self.batches += 1

            def state_dict(self):
                return {"batches": self.batches}

            def load_state_dict(self, state_dict):
                self.batches = state_dict["batches"]
        ```
    """

    def __init__(self) -> None:
        self._step_state: tuple[int, dict[str, Any]] = (-1, {})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep a copy of the state after the last optimization step."""
        if self._step_state[0] != trainer.global_step:
            self._step_state = trainer.global_step, deepcopy(self.own_state())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save that copy if no optimization step has finished since."""
        step, state = self._step_state
        if step == trainer.global_step:
            checkpoint["callbacks"][self.state_key] = self.gather_state(state)

    def own_state(self) -> dict[str, Any]:
        """Return the current state of this process."""
        return self.state_dict()

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `state_dict` from this process's `own_state`; all processes call it together."""
        return state


def callback_states(trainer: L.Trainer, left_out: Callback) -> dict[str, Any]:
    """Return the state of the callbacks in a checkpoint, by key; tensors are not copied."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    states = {each.state_key: each.state_dict() for each in callbacks if each is not left_out}
    return {key: tree_map(lambda leaf: leaf, state) for key, state in states.items() if state}
