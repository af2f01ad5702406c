"""Networks that have shapes and dtypes but no values, so that a run can be planned before weights are loaded."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    if mode is None:
        yield
        return
    with mode, _Creation(mode):
        yield


def empty_without_values(
    size: int,
    view: tuple[Sequence[int], Sequence[int], int],
    dtype: torch.dtype,
    device: torch.device,
    storage_of: Tensor | None = None,
) -> Tensor:
    """Return a tensor without values, inside `without_weights`, by no operation that a mode could count.

    Args:
        size: Number of elements of its storage.
        view: Its shape, strides and offset.
        dtype: Type of its elements.
        device: Its device.
        storage_of: Tensor with the storage; by default it is a new one.
    """
    mode = _SHAPES.get()
    assert mode is not None
    with in_kernel_invocation_manager(mode):
        whole = torch.empty(size, dtype=dtype, device="meta") if storage_of is None else storage_of
        tensor = whole.as_strided(*view)
    return FakeTensor(mode, tensor, device)


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


class _Creation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Create and initialize tensors without values with fewer operations than `FakeTensorMode`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        options = kwargs or {}
        if func is DEVICE:
            return device_of(args[0])
        if func is _aten.empty.memory_format and not options.get("memory_format"):
            device = torch.device(options.get("device") or "cpu")
            if device.type == "cpu":
                return _contiguous(self._mode, args[0], options.get("dtype") or torch.get_default_dtype(), device)
        if func in _WRITES and isinstance(args[0], FakeTensor):
            return args[0]
        if func is _aten.detach.default and _are_alike(args):
            return _as_meta(func, args)
        if func is _aten._to_copy.default and _only_changes_dtype(args[0], options):
            return _contiguous(self._mode, args[0].shape, options["dtype"], args[0].fake_device)
        return func(*args, **options)


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
        if func is _aten._to_copy.default and _only_changes_dtype(args[0], kwargs or {}):
            return _contiguous(args[0].fake_mode, args[0].shape, kwargs["dtype"], args[0].fake_device)
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


def _only_changes_dtype(tensor: Tensor, options: Mapping[str, Any]) -> bool:
    """Return whether a copy of a tensor without values differs from it in dtype alone."""
    others = (value for name, value in options.items() if name != "dtype")
    plain = options.get("dtype") is not None and not any(value is not None for value in others)
    return plain and _are_alike((tensor,)) and tensor.is_contiguous()


def _contiguous(mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
    with in_kernel_invocation_manager(mode):
        tensor = torch.empty(shape, dtype=dtype, device="meta")
    return FakeTensor(mode, tensor, device)


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
