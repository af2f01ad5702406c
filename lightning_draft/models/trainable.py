"""Training of all or some of the denoiser's own weights, with a copy of the original weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_draft.distributed import FSDP2, local_shard
from lightning_draft.errors import ConfigurationError

Trainable = Literal["lora", "full"] | list[str]


class OriginalWeights:
    """Copies of the trained weights before training, on the CPU.

    Args:
        network: The denoiser.
        names: Names of the parameters that will be trained.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._sharded = False
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        for full_name in names:
            owner, _, name = full_name.rpartition(".")
            module = network.get_submodule(owner)
            self._owners.append((module, name, getattr(module, name).detach().to("cpu", copy=True)))

    def shard(self) -> None:
        """Keep only this process's shard of each copy whose parameter was sharded with FSDP2."""
        for index, (module, name, original) in enumerate(self._owners):
            parameter = getattr(module, name, None)
            if isinstance(parameter, DTensor) and parameter.shape == original.shape:
                self._owners[index] = (module, name, _own_shard(original, parameter))
                self._sharded = True

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within this context, the weights are `theta_0 + scale (theta - theta_0)`, without gradient.

        Parameters are replaced and restored, not overwritten, so that a graph through them stays valid. Shards are
        overwritten and restored: the network is gathered from them at each call, also for the backward pass.

        Raises:
            ConfigurationError: The weights were sharded with FSDP1, or with FSDP2 and this is the backward pass.
        """
        trained = [_parameter(module, name) for module, name, _ in self._owners]
        if self._sharded:
            with _overwritten(trained, [original for _, _, original in self._owners], scale):
                yield
            return
        try:
            for (module, name, original), parameter in zip(self._owners, trained, strict=True):
                setattr(module, name, nn.Parameter(_interpolated(original, parameter, scale), requires_grad=False))
            yield
        finally:
            for (module, name, _), parameter in zip(self._owners, trained, strict=True):
                setattr(module, name, parameter)


def check_trainable(trainable: Any) -> None:
    """Check the option `trainable` as far as it does not depend on the denoiser.

    Raises:
        ConfigurationError: It is not `lora`, `full` or a list of names.
    """
    if trainable not in ("lora", "full") and (isinstance(trainable, str) or not trainable):
        raise ConfigurationError(f"trainable: {trainable!r} must be lora, full, or a list of names such as [attn2]")


def unfreeze(network: nn.Module, trainable: Literal["full"] | Sequence[str]) -> OriginalWeights:
    """Make weights trainable and return copies of them.

    Args:
        network: The denoiser, in float32.
        trainable: `full` for all weights, or names: a parameter is trained if one of the names is a sequence of
            complete parts of its dotted name, such as `attn2` or `attn2.to_k` for `mid_block.attn2.to_k.weight`.

    Raises:
        ConfigurationError: A name matches no parameter.
    """
    parameters = dict(network.named_parameters())
    for name in [] if trainable == "full" else trainable:
        if not any(_names(name, full_name) for full_name in parameters):
            parts = sorted({part for full_name in parameters for part in full_name.split(".") if not part.isdigit()})
            raise ConfigurationError(
                f"trainable: {name!r} is not in the name of any parameter of the denoiser; write full, lora, "
                f"or parts of parameter names such as {', '.join(parts[:12])}"
            )
    chosen = [n for n in parameters if trainable == "full" or any(_names(name, n) for name in trainable)]
    for full_name in chosen:
        parameters[full_name].requires_grad_(True)
    return OriginalWeights(network, chosen)


def _names(name: str, full_name: str) -> bool:
    return f".{name}." in f".{full_name}."


def _own_shard(tensor: Tensor, parameter: DTensor) -> Tensor:
    """Return a copy of the rows of a tensor that this process stores of a parameter with its shape."""
    rows = torch.chunk(tensor, parameter.device_mesh.size())
    rank = parameter.device_mesh.get_local_rank()
    return (rows[rank] if rank < len(rows) else tensor[:0]).clone()


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(module, name, None)
    if isinstance(parameter, nn.Parameter):
        return parameter
    raise ConfigurationError(
        "strategy: fsdp flattens the trained weights, so that the original ones cannot take their place; write "
        f"{FSDP2}, or strategy: ddp"
    )


@contextmanager
def _overwritten(parameters: Sequence[Tensor], originals: Sequence[Tensor], scale: float) -> Iterator[None]:
    """Within this context, the shards of parameters are `theta_0 + scale (theta - theta_0)`."""
    if torch._C._current_graph_task_id() != -1:  # blocks that are gathered for the backward pass would keep theta
        raise ConfigurationError(
            "checkpointing=step recomputes the base model in the backward pass, which is not supported if trained "
            "weights are sharded over processes; write checkpointing: block, or none"
        )
    with torch.no_grad():
        shards = [local_shard(parameter) for parameter in parameters]
        trained = [shard.clone() for shard in shards]
    try:
        with torch.no_grad():
            for shard, original in zip(shards, originals, strict=True):
                shard.copy_(_interpolated(original, shard, scale))
        yield
    finally:
        with torch.no_grad():
            for shard, value in zip(shards, trained, strict=True):
                shard.copy_(value)


def _interpolated(original: Tensor, parameter: Tensor, scale: float) -> Tensor:
    value = original.to(parameter.device, parameter.dtype)
    return value if scale == 0 else torch.lerp(value, parameter.detach(), scale)
