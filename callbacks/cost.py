"""What a run has cost so far: reward queries, network passes, seconds."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_draft.models.guidance import Guidance


class CostMonitor(Callback):
    """Count what training costs, without validation and samples, and log it after every optimisation step.

    - `cost/reward_queries`: images that the trained reward was asked about;
    - `cost/network_forwards`: forward passes of the denoiser on one sample, recomputed ones included; a call with
      classifier-free guidance is two;
    - `cost/network_backwards`: backward passes of the denoiser on one sample, counted likewise;
    - `cost/seconds`: time within training steps.

    Counts are over all processes, each taken to do what the first does. They go on where a resumed run left off.
    """

    def __init__(self) -> None:
        self.reward_queries = 0
        self.network_forwards = 0
        self.network_backwards = 0
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = []
        self._asked = 0
        self._passes = 1
        self._started: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Watch the network."""
        self._passes = trainer.world_size * (1 if getattr(pl_module.model, "guidance", Guidance(1)).scale == 1 else 2)
        self._handles = [
            # Before the call: a recomputed one is abandoned as soon as it has what the backward pass needs.
            pl_module.model.register_forward_pre_hook(self._note_forward),
            pl_module.model.register_forward_hook(self._note_backward),
        ]

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop watching."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._release()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock."""
        self._asked = pl_module.reward_queries
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop the clock, and log."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
        self._started = None
        self.reward_queries += trainer.world_size * (pl_module.reward_queries - self._asked)
        pl_module.log_dict({f"cost/{name}": float(value) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        names = ("reward_queries", "network_forwards", "network_backwards", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _note_forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._started is not None:
            self.network_forwards += self._passes * len(inputs[0])

    def _note_backward(self, model: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        samples = len(inputs[0])

        def note(gradient: Tensor) -> None:
            self.network_backwards += self._passes * samples

        if self._started is not None and output.requires_grad:
            output.register_hook(note)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
