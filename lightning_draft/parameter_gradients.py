"""Gradients of parameters, also if a strategy shards them over processes."""

import math
from collections.abc import Iterable
from typing import cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_draft.distributed import trainable_parameters, uses_deepspeed, uses_fsdp


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return this process's shard of a gradient.

    Under DeepSpeed, whose optimizer stores the gradients, this is the full gradient, and all processes must call
    together.
    """
    if not _in_deepspeed(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad  # type: ignore[import-not-found, unused-ignore]

    return cast(Tensor, safe_get_full_grad(parameter))


def changes_gradients(trainer: L.Trainer) -> bool:
    """Return whether gradients are sharded over processes, stored elsewhere than in parameters, or scaled."""
    return uses_fsdp(trainer) or uses_deepspeed(trainer) or gradient_scaler(trainer) is not None


def gradient_scaler(trainer: L.Trainer) -> GradScaler | None:
    """Return the scaler of the gradients (fp16), if there is one.

    While it searches for a scale, gradients that are not finite are expected.
    """
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, (MixedPrecision, FSDPPrecision)) else None


def multiply_gradient(parameter: nn.Parameter, factor: float) -> None:
    """Multiply a gradient in place; a factor of 0 also replaces values that are not finite.

    Under DeepSpeed all processes must call together.
    """
    value = gradient(parameter)
    if value is None:
        return
    product = value * factor if factor else torch.zeros_like(value)
    if not _in_deepspeed(parameter):
        value.copy_(product)
        return
    from deepspeed.utils import safe_set_full_grad

    safe_set_full_grad(parameter, product)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Remove gradients, so that the optimizer changes neither parameters nor its state.

    DeepSpeed's optimizer cannot skip a step; the gradient is set to 0 instead.
    """
    for parameter in parameters:
        if parameter.grad is None:
            multiply_gradient(parameter, 0)
        parameter.grad = None


def parameters_with_gradients(
    trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer
) -> list[nn.Parameter]:
    """Return the parameters with a gradient; with sharding all parameters, so that every process has the same list."""
    if uses_deepspeed(trainer):  # its optimizer holds flat copies
        return list(trainable_parameters(module).values())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return parameters if uses_fsdp(trainer) else [p for p in parameters if p.grad is not None]


def gradient_norm(parameters: Iterable[nn.Parameter], trainer: L.Trainer) -> float:
    """Return the 2-norm of the gradient over all parameters and shards; infinite if it is not finite.

    All processes must call it together; they receive the same value.
    """
    gradients = [value for value in map(gradient, parameters) if value is not None]
    full: list[Tensor] = [value for value in gradients if not isinstance(value, DTensor)]
    shards = [value for value in gradients if isinstance(value, DTensor)]
    square = torch.zeros((), device=trainer.strategy.root_device)
    if full:
        square = square + get_total_norm(full).square()
    if isinstance(trainer.strategy, FSDPStrategy):
        square = trainer.strategy.reduce(square, reduce_op="sum")
    if shards:
        norm = get_total_norm(shards)
        square = square + (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    # Replicas have the same gradients; the maximum ensures that all processes make the same decision.
    square = trainer.strategy.reduce(square.nan_to_num(nan=math.inf, posinf=math.inf), reduce_op="max")
    return float(square.sqrt())


def _in_deepspeed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping")
