"""Training of all or some of the denoiser's own weights, with a copy of the original weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_draft.errors import ConfigurationError

Trainable = Literal["lora", "full"] | list[str]


class OriginalWeights:
    """Copies of the trained weights before training, on the CPU.

    Args:
        network: The denoiser.
        names: Names of the parameters that will be trained.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        for full_name in names:
            owner, _, name = full_name.rpartition(".")
            module = network.get_submodule(owner)
            self._owners.append((module, name, getattr(module, name).detach().to("cpu", copy=True)))

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within this context, the weights are `theta_0 + scale (theta - theta_0)`, without gradient.

        The parameters are replaced and restored, not overwritten, so that a graph through them stays valid.
        """
        trained = [(module, name, getattr(module, name)) for module, name, _ in self._owners]
        try:
            for (module, name, parameter), (_, _, original) in zip(trained, self._owners, strict=True):
                setattr(module, name, nn.Parameter(_interpolated(original, parameter, scale), requires_grad=False))
            yield
        finally:
            for module, name, parameter in trained:
                setattr(module, name, parameter)


def unfreeze(network: nn.Module, trainable: Literal["full"] | Sequence[str]) -> OriginalWeights:
    """Make weights trainable and return copies of them.

    Args:
        network: The denoiser, in float32.
        trainable: `full` for all weights, or names: a parameter is trained if one of the names is a sequence of
            complete parts of its dotted name, such as `attn2` or `attn2.to_k` for `mid_block.attn2.to_k.weight`.

    Raises:
        ConfigurationError: A name matches no parameter, a name is not in a list, or the list is empty.
    """
    if trainable != "full" and (isinstance(trainable, str) or not trainable):
        raise ConfigurationError(f"trainable: {trainable!r} must be lora, full, or a list of names such as [attn2]")
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


def _interpolated(original: Tensor, parameter: Tensor, scale: float) -> Tensor:
    if isinstance(parameter, DTensor) or parameter.shape != original.shape:
        raise ConfigurationError(
            "the original weights of a model with trainable='full' are not available if parameters are sharded over "
            "processes; set the Trainer's strategy to ddp, or trainable='lora'"
        )
    value = original.to(parameter.device, parameter.dtype)
    return value if scale == 0 else torch.lerp(value, parameter.detach(), scale)
