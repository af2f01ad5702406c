"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_draft.arguments import boolean, in_range
from lightning_draft.distributed import all_gather_objects, local_shard, trainable_parameters, uses_fsdp, world_size
from lightning_draft.errors import ConfigurationError

_LIGHTNING_AVERAGES = {"StochasticWeightAveraging", "WeightAveraging"}  # the second is not in lightning 2.5


class AdapterEMA(Callback):
    """Keep an exponential moving average of the trained parameters, and use it instead of them outside training steps.

    After optimization step `n` the average is `d * average + (1 - d) * parameters` with `d = decay`, or during warm-up
    `d = min(decay, (1 + n) / (10 + n))`. Validation, samples, the over-optimization guard and exported files use the
    average. Training continues with the parameters themselves. A checkpoint contains both, so that a resumed run equals
    an uninterrupted one.

    Note:
        If parameters are sharded, each process averages its shard, and a run must be resumed with the same number of
        processes.

    Example:
        ```python
        trainer = Trainer(max_steps=1000, callbacks=[AdapterEMA(decay=0.99), LoRAExport()])
        ```

    Args:
        decay: Weight of the old average in an update, in [0, 1); the average covers about the last `1 / (1 - decay)`
            steps.
        warmup: Start with a smaller decay, so that the untrained adapters lose their weight in the average sooner.
    """

    def __init__(self, decay: float = 0.99, warmup: bool = True) -> None:
        hint = "write 0.99, which averages over about 100 steps"
        self.decay = in_range("AdapterEMA: decay", decay, 0, 1, hint, below_high=True)
        self.warmup = boolean("AdapterEMA: warmup", warmup)
        self._average: tuple[int, dict[str, Tensor]] = (0, {})  # number of steps, and the average
        self._originals: dict[str, Tensor] | None = None
        self._in_parts = False

    @property
    def updates(self) -> int:
        """Number of optimization steps in the average."""
        return self._average[0]

    @property
    def average(self) -> dict[str, Tensor]:
        """The average by parameter name; empty before training starts."""
        return self._average[1]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Initialize the average with the parameters, unless a checkpoint contains an average."""
        self._in_parts = uses_fsdp(trainer)
        parameters = trainable_parameters(pl_module)
        if not self.average:
            started = {name: _widened(parameter).clone() for name, parameter in parameters.items()}
            self._average = trainer.global_step, started
        elif _shapes(self.average) != _shapes({name: local_shard(value) for name, value in parameters.items()}):
            raise ConfigurationError(
                "the averaged parameters in the checkpoint do not match the trained parameters of this model; resume "
                "with the saved config and strategy of the run, or without AdapterEMA"
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Update the average after an optimization step."""
        self.update(pl_module, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Use the average during validation."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the trained parameters."""
        self.restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the trained parameters if validation was interrupted."""
        self.restore(pl_module)

    @torch.no_grad()
    def update(self, pl_module: L.LightningModule, step: int) -> None:
        """Update the average with the parameters after `step` optimization steps, once for each step."""
        if step <= self.updates or not self.average or self._originals is not None:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        # Assigned in one statement, so that an interruption leaves either the old or the new average.
        self._average = (
            step,
            {
                name: self.average[name].to(parameter.device).lerp(_widened(parameter), 1 - decay)
                for name, parameter in trainable_parameters(pl_module).items()
            },
        )

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Within this context, use the average instead of the trained parameters."""
        outermost = self._swap_in(pl_module)
        try:
            yield
        finally:
            if outermost:
                self.restore(pl_module)

    @torch.no_grad()
    def restore(self, pl_module: L.LightningModule) -> None:
        """Restore the trained parameters if the average is in use."""
        if self._originals is not None:
            for name, parameter in trainable_parameters(pl_module).items():
                local_shard(parameter.data).copy_(self._originals[name])
        self._originals = None

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of steps in it."""
        average = {name: value.cpu() for name, value in self.average.items()}
        return {"updates": self.updates, "average": all_gather_objects(average) if self._in_parts else average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved average."""
        average = state_dict["average"]
        if isinstance(average, list):
            if len(average) != world_size():
                raise ConfigurationError(
                    f"the checkpoint contains the average of {len(average)} processes and there are {world_size()} "
                    f"now; resume with {len(average)} processes, or without AdapterEMA"
                )
            average = average[dist.get_rank() if world_size() > 1 else 0]
        self._average = state_dict["updates"], {name: value.clone() for name, value in average.items()}

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> bool:
        """Use the average instead of the parameters; return False if there is none or it is already in use."""
        if not self.average or self._originals is not None:
            return False
        parameters = trainable_parameters(pl_module)
        self._originals = {name: local_shard(parameter.detach()).clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            local_shard(parameter.data).copy_(self.average[name])
        return True


def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> AbstractContextManager[None]:
    """Return a context that uses the average of the parameters if there is an `AdapterEMA`, else one without effect.

    The average includes the last finished step, regardless of the order of the callbacks.

    Args:
        trainer: The trainer.
        pl_module: Its module.
    """
    for callback in _averages(trainer):
        callback.update(pl_module, trainer.global_step)
        return callback.averaged(pl_module)
    return nullcontext()


def check_averaging(callbacks: Iterable[Callback]) -> None:
    """Check that no callback of Lightning averages the weights.

    Raises:
        ConfigurationError: There is one; exported files would contain other weights than those that were validated.
    """
    for callback in callbacks:
        if _LIGHTNING_AVERAGES & {base.__name__ for base in type(callback).__mro__}:
            raise ConfigurationError(
                f"--trainer.callbacks={type(callback).__name__} cannot be used: it copies the frozen weights too, and "
                "LoRA files would contain other weights than those that were validated; write --ema AdapterEMA "
                "(in Python, callbacks=[AdapterEMA()])"
            )


def restore_trained(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Restore the trained parameters if their average is in use."""
    for callback in _averages(trainer):
        callback.restore(pl_module)


def all_averages(trainer: L.Trainer) -> list[dict[str, Tensor]]:
    """Return the averages of a run by parameter name; changing them in place changes the averages."""
    return [callback.average for callback in _averages(trainer)]


def _averages(trainer: L.Trainer) -> list[AdapterEMA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, AdapterEMA)]  # type: ignore[attr-defined]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _widened(parameter: nn.Parameter) -> Tensor:
    """Return the shard of this process in at least float32, because in bfloat16 small updates would round to 0."""
    return local_shard(parameter.detach()).to(torch.promote_types(parameter.dtype, torch.float32))
