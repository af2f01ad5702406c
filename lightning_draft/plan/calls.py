"""Descriptions of network calls, by which calls with the same memory and cost are recognized."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_draft.weightless import empty_without_values

_IGNORED = frozenset(vars(nn.Module())) - {"training"} | {"kwargs", "layer_idx"}
"""Attributes of all modules, and those with the name or number of a layer."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size, type)
_MANY = 2**16
"""Number of values up to which the integers of an input are part of its description."""


class UnknownKindError(Exception):
    """A call cannot be described."""


@dataclass(frozen=True)
class TensorKind:
    """All properties of a tensor without values that operations depend on.

    Args:
        nbytes: Size of its storage.
        shape: Its shape.
        stride: Its strides.
        offset: Position of its first element in the storage.
        dtype: Type of its elements.
        device: Its device.
    """

    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorKind":
        """Describe a tensor.

        Raises:
            UnknownKindError: It has values, or is of another class.
        """
        if type(tensor) not in (FakeTensor, nn.Parameter) or not isinstance(tensor, FakeTensor):
            raise UnknownKindError
        nbytes, device = tensor.untyped_storage().nbytes(), tensor.fake_device
        return cls(nbytes, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, device)

    @classmethod
    def flat(cls, nbytes: int) -> "TensorKind":
        """Describe a tensor with so many bytes."""
        return cls(nbytes, (nbytes,), (1,), 0, torch.uint8, torch.device("cpu"))

    @property
    def alone(self) -> "TensorKind":
        """The kind of a tensor with the same strides in a storage of its own."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return replace(self, nbytes=span * self.dtype.itemsize if all(self.shape) else 0, offset=0)

    @property
    def gradient(self) -> "TensorKind":
        """The kind of its gradient."""
        number = math.prod(self.shape)
        if self.alone.nbytes == number * self.dtype.itemsize:
            return self.alone
        stride = tuple(math.prod(self.shape[n + 1 :]) for n in range(len(self.shape)))
        return replace(self, nbytes=number * self.dtype.itemsize, stride=stride, offset=0)

    def new(self, storage_of: Tensor | None = None) -> Tensor:
        """Return a new tensor of this kind, which no tracker counts, in a new storage or that of another tensor."""
        size = self.nbytes // self.dtype.itemsize
        return empty_without_values(size, (self.shape, self.stride, self.offset), self.dtype, self.device, storage_of)


@dataclass(frozen=True)
class Output:
    """An output that is a new tensor.

    Args:
        kind: Its kind.
        storage: Number of the first new output with the same storage.
    """

    kind: TensorKind
    storage: int


def leaf_kind(leaf: Any) -> Hashable:
    """Describe an argument of a call: a tensor or a plain value.

    Raises:
        UnknownKindError: It is something else.
    """
    if isinstance(leaf, FakeTensor):
        return TensorKind.of(leaf).alone, leaf.requires_grad
    if isinstance(leaf, Tensor):
        if leaf.dtype.is_floating_point:
            return leaf.shape, leaf.dtype, leaf.requires_grad
        if leaf.numel() > _MANY:
            raise UnknownKindError
        return leaf.shape, leaf.dtype, tuple(leaf.flatten().tolist())
    if not isinstance(leaf, _PLAIN):
        raise UnknownKindError
    return type(leaf), leaf


def copies(leaves: Sequence[Any]) -> list[Any]:
    """Return arguments of the same kinds without a graph, which no tracker counts."""
    return [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return TensorKind.of(tensor).alone.new().requires_grad_(tensor.requires_grad)
    with torch._C._DisableTorchDispatch():
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def network_kind(network: nn.Module) -> tuple[Hashable, list[nn.Parameter]]:
    """Describe a network by all that its calls depend on except values, and return its trained parameters."""
    found: list[Hashable] = []
    trained: list[nn.Parameter] = []
    for name, module in _modules(network):
        found.append((name, type(module), "forward" in vars(module)))
        for key, value in vars(module).items():
            if key not in _IGNORED and isinstance(value, (*_PLAIN, dict, list, tuple)):
                found += [key, _plain(value)]
        for parameter in module._parameters.values():
            if parameter is not None:
                found.append((parameter.shape, parameter.dtype, parameter.requires_grad))
                if parameter.requires_grad:
                    trained.append(parameter)
        found += [(each.shape, each.dtype) for each in module._buffers.values() if each is not None]
    return tuple(found), trained


def _modules(network: nn.Module, name: str = "") -> Any:
    yield name, network
    for key, child in network._modules.items():
        if child is not None:
            yield from _modules(child, key)


def _plain(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _plain(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return tuple(map(_plain, value))
    return value if isinstance(value, _PLAIN) else type(value)


def output_kinds(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Describe outputs: `Output` for a new tensor, the number of an input or earlier output, or `(value,)`.

    Raises:
        UnknownKindError: An output is a part of an input.
    """
    values, found = [*inputs, *outputs], list[Any]([None] * len(inputs))
    first: dict[int, int] = {}
    created: dict[int, int] = {}
    for number, value in enumerate(values):
        if not isinstance(value, Tensor):
            leaf_kind(value)
            found += [(value,)] if number >= len(inputs) else []
            continue
        place = first.setdefault(value.untyped_storage()._cdata, number)
        if number < len(inputs):
            continue
        kind = TensorKind.of(value)
        if place != number and TensorKind.of(values[place]) == kind:
            found.append(place)
        elif place < len(inputs):
            raise UnknownKindError
        else:
            created[number] = len(created)
            found.append(Output(kind, created[place]))
    return found[len(inputs) :]
