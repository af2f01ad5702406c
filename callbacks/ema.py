"""Exponential moving average of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_draft.distributed import all_gather_objects, local_shard, trainable_parameters, uses_fsdp, world_size
from lightning_draft.errors import ConfigurationError


class AdapterEMA(Callback):
    """Keep an exponential moving average of the trainable parameters and use it wherever the model is looked at.

    After update `n` the average is `d * average + (1 - d) * parameters` with `d = decay`, or during warm-up
    `d = min(decay, (1 + n) / (10 + n))`. Validation, samples and exported adapters use the average; training goes on
    with the parameters themselves, and a checkpoint holds both, so that a resumed run equals the uninterrupted one.
    Where parameters are sharded each process averages its part, and as many processes must resume.

    Args:
        decay: Share of the old average that an update keeps, in [0, 1); the average looks back about `1 / (1 - decay)`
            steps.
        warmup: Start with a shorter memory, so that the average leaves the untrained adapters behind sooner.
    """

    def __init__(self, decay: float = 0.99, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"decay={decay} must lie in [0, 1); 0.99 averages over about 100 steps")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] | None = None
        self._in_parts = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average at the parameters, unless a checkpoint brought one."""
        self._in_parts = uses_fsdp(trainer)
        parameters = trainable(pl_module)
        if not self.average:
            self.updates = trainer.global_step
            self.average = {name: _widened(parameter).clone() for name, parameter in parameters.items()}
        elif _shapes(self.average) != _shapes({name: local_shard(value) for name, value in parameters.items()}):
            raise ConfigurationError(
                "the averaged adapters in the checkpoint are not those of this model; resume with the config that the "
                "run saved, on the strategy that it had, or without AdapterEMA"
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take in the parameters of a finished optimisation step."""
        self.update(pl_module, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parameters back."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the parameters back if validation was interrupted."""
        self._swap_out(pl_module)

    @torch.no_grad()
    def update(self, pl_module: L.LightningModule, step: int) -> None:
        """Take in the parameters as they are after `step` optimisation steps; once for each step."""
        if step <= self.updates or not self.average or self._originals is not None:
            return
        self.updates = step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for name, parameter in trainable(pl_module).items():
            self.average[name] = self.average[name].to(parameter.device)
            self.average[name].lerp_(_widened(parameter), 1 - decay)

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Within this context the model's adapters are the average."""
        outermost = self._swap_in(pl_module)
        try:
            yield
        finally:
            if outermost:
                self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps it has taken in."""
        average = {name: value.cpu() for name, value in self.average.items()}
        return {"updates": self.updates, "average": all_gather_objects(average) if self._in_parts else average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved average."""
        self.updates = state_dict["updates"]
        average = state_dict["average"]
        if isinstance(average, list):
            if len(average) != world_size():
                raise ConfigurationError(
                    f"the checkpoint holds an average in the parts of {len(average)} processes and there are "
                    f"{world_size()} now; resume with as many, or without AdapterEMA"
                )
            average = average[dist.get_rank() if world_size() > 1 else 0]
        self.average = {name: value.clone() for name, value in average.items()}

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> bool:
        """Whether this call put the average in place: there is one, and it was not in place already."""
        if not self.average or self._originals is not None:
            return False
        parameters = trainable(pl_module)
        self._originals = {name: local_shard(parameter.detach()).clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            local_shard(parameter.data).copy_(self.average[name])
        return True

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._originals is not None:
            for name, parameter in trainable(pl_module).items():
                local_shard(parameter.data).copy_(self._originals[name])
        self._originals = None


def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> AbstractContextManager[None]:
    """A context in which the adapters are their average if the trainer has an `AdapterEMA`, else one without effect.

    The average has taken in the last finished step, whatever the order of the callbacks.

    Args:
        trainer: The trainer.
        pl_module: Its module.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdapterEMA):
            callback.update(pl_module, trainer.global_step)
            return callback.averaged(pl_module)
    return nullcontext()


def trainable(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return trainable_parameters(pl_module)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _widened(parameter: nn.Parameter) -> Tensor:
    """This process's part, at least float32: a bfloat16 average stands still."""
    return local_shard(parameter.detach()).to(torch.promote_types(parameter.dtype, torch.float32))
