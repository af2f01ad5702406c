"""Denoisers whose parameters are sharded over processes: Lightning's FSDP2, FSDP and DeepSpeed strategies.

Only the denoiser is sharded. All processes must take part in gathering parameters, and the denoiser is called equally
often on each. A text encoder may be called on one process and not on another, because embeddings are cached; text
encoders, autoencoder and rewards are therefore replicated.

References:
    Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277. Rajbhandari et
    al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, wrap
from torch.distributed.tensor import DTensor

from lightning_draft.errors import ConfigurationError

_WRAPPED = "_fsdp_wrapped_module."
FSDP2 = (
    "strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: N, "
    "tensor_parallel_size: 1, save_distributed_checkpoint: false}}, with N the number of processes"
)


def uses_fsdp(trainer: L.Trainer | None) -> bool:
    """Return whether each process stores only a shard of the parameters."""
    return trainer is not None and isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def uses_deepspeed(trainer: L.Trainer | None) -> bool:
    """Return whether DeepSpeed's optimizer stores the gradients, sharded over the processes."""
    return trainer is not None and isinstance(trainer.strategy, DeepSpeedStrategy)


def check_not_sharded(copied: str, trainer: L.Trainer | None) -> None:
    """Check that each process stores whole parameters.

    Args:
        copied: What needs a copy of them.
        trainer: The Trainer, if there is one.

    Raises:
        ConfigurationError: Parameters or gradients are sharded over processes.
    """
    if uses_fsdp(trainer) or uses_deepspeed(trainer):
        raise ConfigurationError(
            f"{copied} needs a copy of the trained parameters, which is not supported with sharding; set the Trainer's "
            "strategy to ddp"
        )


def check_not_spawned() -> None:
    """Check that the module is not pickled for a process that `ddp_spawn` starts.

    Raises:
        ConfigurationError: It is.
    """
    if get_spawning_popen() is not None:
        raise ConfigurationError(
            "strategy=ddp_spawn would send the module to new processes, and callables such as the optimizer cannot "
            "be sent; write strategy=ddp, or strategy=ddp_notebook in a notebook"
        )


def shard(module: L.LightningModule, model: nn.Module, denoiser: nn.Module) -> None:
    """Shard the denoiser over the processes if the Trainer's strategy shards; otherwise do nothing.

    Call it in `configure_model`, after adapters were added. A denoiser that is already sharded is not changed.

    Args:
        module: The module that the Trainer trains.
        model: Its model.
        denoiser: The model's network, which is sharded block by block.

    Raises:
        ConfigurationError: The strategy, or one of its settings, is not supported.
    """
    strategy = None if module._trainer is None else module.trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        _check_deepspeed(strategy, model)
        strategy.exclude_frozen_parameters = True
    if not isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        return
    name = _child_name(model, denoiser, type(strategy).__name__)
    if isinstance(denoiser, (FSDPModule, FullyShardedDataParallel)):
        return
    if isinstance(strategy, ModelParallelStrategy):
        _check_mesh(strategy)
        mesh = strategy.device_mesh["data_parallel"]
        for part in [*blocks(denoiser), denoiser]:  # the whole network last; it is resharded like its blocks
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return
    _check_casts(strategy, model, "bf16-mixed")
    units = {*blocks(denoiser), *adapters(denoiser)}
    for part in _others(module, model, denoiser):
        part.to(strategy.root_device)
    policy = CustomPolicy(lambda part: part in units)
    # The other arguments come from the context in which Lightning calls `configure_model`. Its precision is not used,
    # so that autocast applies as with other strategies.
    setattr(model, name, wrap(denoiser, auto_wrap_policy=policy, mixed_precision=strategy.mixed_precision))


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the units that are gathered one at a time: the denoiser's blocks, and children with lists of blocks."""
    found: list[nn.Module] = []
    for child in denoiser.children():
        if isinstance(child, nn.ModuleList):
            found += child
        elif any(isinstance(part, nn.ModuleList) for part in child.children()):
            found.append(child)
    return found


def adapters(denoiser: nn.Module) -> list[nn.Module]:
    """Return the trained layers within a frozen denoiser.

    FSDP flattens a unit into one parameter with one dtype; if any part of it is trained, the whole has a gradient.
    """
    if all(parameter.requires_grad for parameter in denoiser.parameters()):
        return []
    leaves = [part for part in denoiser.modules() if not any(part.children())]
    return [part for part in leaves if any(parameter.requires_grad for parameter in part.parameters())]


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return this process's shards of the trainable parameters, by their names without sharding."""
    return {
        name.replace(_WRAPPED, ""): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_full(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the full trainable parameters by name; all processes must call it together."""
    with _gathered(module):
        return {name: _full(parameter).detach().clone() for name, parameter in trainable_parameters(module).items()}


def clip_gradients(denoiser: nn.Module, limit: float) -> None:
    """Scale the gradient so that its norm over all shards is at most `limit`; for `FSDPStrategy`."""
    cast(FullyShardedDataParallel, denoiser).clip_grad_norm_(limit)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Gather the trained parameters of FSDP within this context; frozen parameters stay sharded."""
    with ExitStack() as stack:
        for unit in FullyShardedDataParallel.fsdp_modules(module):
            own = [p for name, p in unit.named_parameters() if name.count(_WRAPPED) == 1]
            if any(parameter.requires_grad for parameter in own):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
        yield


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _child_name(model: nn.Module, denoiser: nn.Module, strategy: str) -> str:
    """Return the name of the denoiser in the model.

    Raises:
        ConfigurationError: The denoiser is not a child of the model.
    """
    names = [name for name, child in model.named_children() if child is denoiser]
    if not names:
        raise ConfigurationError(
            f"{strategy} shards the denoiser, and {type(model).__name__} has no child module that is its denoiser; add "
            "a property `denoiser` to the class, or set the Trainer's strategy to ddp"
        )
    return names[0]


def _others(module: nn.Module, model: nn.Module, denoiser: nn.Module) -> Iterable[nn.Module]:
    """Return all modules but the denoiser."""
    yield from (child for child in module.children() if child is not model)
    yield from (child for child in model.children() if child is not denoiser)


def _check_mesh(strategy: ModelParallelStrategy) -> None:
    """Raise for tensor parallelism and for sharded checkpoints."""
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            "ModelParallelStrategy would split single layers over processes (tensor parallelism), which is not "
            f"supported; write {FSDP2}"
        )
    if strategy._save_distributed_checkpoint:
        raise ConfigurationError(
            "ModelParallelStrategy reads all parameters from its sharded checkpoints, and checkpoints contain the "
            "trained ones only; write save_distributed_checkpoint: false"
        )


def _check_deepspeed(strategy: DeepSpeedStrategy, model: nn.Module) -> None:
    """Raise unless DeepSpeed runs ZeRO-1 or ZeRO-2 in float32.

    Under ZeRO-3 the parameters of every module are empty between its calls. Text encoders read the shapes of their
    parameters before they are called, and may be called on one process and not on another.
    """
    strategy._init_config_if_needed()
    if strategy.zero_stage_3:
        raise ConfigurationError(
            "DeepSpeed's ZeRO-3 also shards text encoders, autoencoder and rewards, which are not called equally often "
            f"on all processes; write {FSDP2}, or strategy: fsdp"
        )
    precision = strategy.precision_plugin.precision
    if "true" not in precision:
        raise ConfigurationError(
            f"DeepSpeed casts all modules to precision={precision}, including rewards and adapters; write precision: "
            "32-true, or strategy: ddp"
        )
    _check_casts(strategy, model)


def _check_casts(strategy: FSDPStrategy | DeepSpeedStrategy, model: nn.Module, cure: str | None = None) -> None:
    """Raise for a `true` precision that would cast frozen parameters of another dtype."""
    plugin: Any = strategy.precision_plugin
    if "true" not in plugin.precision:
        return
    wanted = plugin._desired_dtype if cure is None else plugin._desired_input_dtype
    odd = {p.dtype for p in model.parameters() if p.is_floating_point()} - {wanted}
    if odd:
        name = str(odd.pop()).removeprefix("torch.")
        advice = "dtype: float32 on the model" if cure is None else f"precision: {cure}"
        raise ConfigurationError(
            f"{type(strategy).__name__} casts all parameters to precision={plugin.precision}, including those of the "
            f"model in {name}; write {advice}"
        )


def all_gather_objects(own: Any) -> list[Any]:
    """Return the objects of all processes, by rank; all processes must call it together."""
    gathered = [own] * world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, own)
    return gathered


def world_size() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
