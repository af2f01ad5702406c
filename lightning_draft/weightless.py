"""Networks that have shapes and dtypes but no values, so that a run can be planned before weights are loaded."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

_SHAPES: ContextVar[FakeTensorMode | None] = ContextVar("shapes", default=None)
_aten = torch.ops.aten

DEVICE = torch.ops.prim.device.default
"""The operation that returns the device of a tensor without values, which is more frequent than all others together."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Within this context pipelines are built from their configuration files, and their weights have no values.

    Operations on such a tensor only compute the shape, dtype and device of their result
    (`torch._subclasses.FakeTensorMode`). If Python code reads a value, it gets one that passes the usual checks: 0.5, 0
    or true, and false from `any`. Schedules, samplers and small rewards are not changed.
    """
    token, apply = _SHAPES.set(FakeTensorMode(allow_non_fake_inputs=True)), nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        with _PlausibleValues():
            yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        _SHAPES.reset(token)


def is_without_weights() -> bool:
    """Return whether pipelines are built without their weights."""
    return _SHAPES.get() is not None


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this context, and inside `without_weights`, new tensors have no values."""
    mode = _SHAPES.get()
    with nullcontext() if mode is None else mode:
        yield


def device_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor; for one without values faster than its attribute, which is an operation."""
    if not isinstance(tensor, FakeTensor):
        return tensor.device
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert parameters and buffers; `nn.Module.to` cannot replace tensors that have no values."""
    tied: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeping the old ones alive keeps ids unique
    for each in module.modules() if recurse else (module,):
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if id(parameter) not in tied:
                    tied[id(parameter)] = (parameter, _converted(parameter, function))
                each._parameters[name] = tied[id(parameter)][1]
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else function(buffer)
    return module


def _converted(parameter: nn.Parameter, function: Callable[[Tensor], Tensor]) -> nn.Parameter:
    data = parameter.data
    converted = function(data)
    return parameter if converted is data else nn.Parameter(converted, parameter.requires_grad)


class _PlausibleValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Return a plausible value from `Tensor.item()` if the tensor has none, and select by masks that have values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._false: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, unless it reads or writes values that do not exist."""
        if func is DEVICE:
            return device_of(args[0])
        if func in _WRITES and isinstance(args[0], FakeTensor):
            return args[0]
        if func in _SIMPLE and _are_alike(args) and not kwargs:
            return _as_meta(func, args)
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func is _aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = (args[0], _positions(args[1]))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is _aten.any:
            self._false.add(result.untyped_storage())
        return result

    def _value(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype is torch.bool:
            return tensor.untyped_storage() not in self._false
        return 0.5 if tensor.dtype.is_floating_point else 0


_WRITES = frozenset(
    getattr(getattr(_aten, name), overload)
    for name, overload in {
        "uniform_": "default",
        "normal_": "default",
        "zero_": "default",
        "fill_": "Scalar",
        "addcmul_": "default",
        "addcdiv_": "default",
        "lerp_": "Scalar",
    }.items()
)
"""Frequent operations that only change values: initialization and the optimizer."""


_ELEMENTWISE = frozenset(getattr(_aten, name).Tensor for name in ("add", "sub", "mul", "div"))

_SIMPLE = _ELEMENTWISE | {
    *(getattr(_aten, name).default for name in ("detach", "view", "t", "_unsafe_view", "mm", "bmm", "addmm")),
    _aten.transpose.int,
}
"""Frequent operations of which `FakeTensorMode` only needs the result's shape, which takes it long."""


def _are_alike(values: Sequence[Any]) -> bool:
    """Return whether the tensors among an operation's arguments have no values and the same device."""
    tensors: list[Any] = [value for value in values if isinstance(value, Tensor)]
    return all(
        type(each) is FakeTensor and each.constant is None and each.fake_device == tensors[0].fake_device
        for each in tensors
    )


def _as_meta(func: Any, args: Sequence[Any]) -> FakeTensor:
    """Run an operation with one result on shapes alone."""
    first = next(value for value in args if isinstance(value, FakeTensor))
    shape = _known_shape(func, args)
    with in_kernel_invocation_manager(first.fake_mode):
        result = func(*args) if shape is None else torch.empty(shape, dtype=first.dtype, device="meta")
    return FakeTensor(first.fake_mode, result, first.fake_device)


def _known_shape(func: Any, args: Sequence[Any]) -> Sequence[int] | None:
    """Return the shape of a contiguous result with the dtype of the operands; `None` if torch must compute it."""
    if func is _aten.addmm.default:
        return (args[1].shape[0], args[2].shape[1]) if args[0].dtype is args[1].dtype is args[2].dtype else None
    if func not in _ELEMENTWISE or not isinstance(args[0], FakeTensor):
        return None
    first, second = args
    if not first.dtype.is_floating_point or not first.is_contiguous():
        return None
    if isinstance(second, FakeTensor):
        alike = second.dtype is first.dtype and second.shape == first.shape and second.is_contiguous()
    else:
        alike = type(second) in (int, float)
    return first.shape if alike else None


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace masks, whose number of true values must be known, by the positions of these values."""
    known: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        known += index.nonzero(as_tuple=True) if index is not None and is_mask else [index]
    return known
