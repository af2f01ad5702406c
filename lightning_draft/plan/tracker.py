"""Count bytes of live tensors, and floating-point operations, by the part of the model that created them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_draft.weightless import DEVICE, device_of

OTHER = "other"
"""Tensors created outside all parts: latents, sampler, loss, and gradients in the backward pass."""


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, count the storages that operations create and the FLOPs of the operations.

    The count is exact and repeatable. Scratch space inside an operation and the allocator's rounding are not included.

    Args:
        parts: The networks by the name of their part.

    Attributes:
        now: Bytes of the tensors that exist now.
        peak: Largest value of `now` so far.
        at_peak: `peak` by part.
        flops: Floating-point operations by part; a multiply-add counts as two.
        calls: Number of forward calls by part, including recomputation.
    """

    def __init__(self, parts: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._parts = dict(parts or {})
        self._alive: Counter[str] = Counter()
        self._entered: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Start counting."""
        for name, module in self._parts.items():
            for entry in (module, *module.children()):
                self._handles.append(entry.register_forward_pre_hook(self._enter(name)))
                self._handles.append(entry.register_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the outputs that share no storage with an input."""
        if func is DEVICE:
            return device_of(args[0])
        kwargs = kwargs or {}
        old = {storage._cdata for storage in _storages((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        part = self._entered[-1] if self._entered else OTHER
        for storage in _storages(result):
            if storage._cdata not in old:
                old.add(storage._cdata)
                self._add(part, storage)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops[part] += int(count(*args, **kwargs, out_val=result))
        return result

    def _add(self, part: str, storage: Any) -> None:
        size = storage.nbytes()
        self.now += size
        self._alive[part] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, Counter(self._alive)
        weakref.finalize(storage, self._free, part, size)

    def _free(self, part: str, size: int) -> None:
        self.now -= size
        self._alive[part] -= size

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if not self._entered or self._entered[-1] != name:
                self.calls[name] += 1
            self._entered.append(name)

        return enter

    def _leave(self, *_: Any) -> None:
        self._entered.pop()


def _storages(values: Any) -> Iterator[Any]:
    """Yield the storages of the tensors among an operation's arguments or results, also in nested lists."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
