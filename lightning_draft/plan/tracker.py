"""Count bytes of live tensors, and floating-point operations, by the part of the model that created them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_draft.weightless import DEVICE, device_of

OTHER = "other"
"""Tensors created outside all parts: latents, sampler, loss, and gradients in the backward pass."""


@dataclass(frozen=True)
class Section:
    """Memory and cost of a part of a step.

    Args:
        peak: Largest number of bytes of live tensors minus that at a reference point.
        at_peak: `peak` by part.
        flops: Floating-point operations by part.
        calls: Number of forward calls by part.
    """

    peak: int = 0
    at_peak: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)

    def relative_to(self, size: int, parts: Mapping[str, int]) -> "Section":
        """Return the section with another reference point.

        Args:
            size: Bytes of live tensors at that point, relative to the present one.
            parts: `size` by part.
        """
        at_peak = Counter(self.at_peak)
        at_peak.subtract(parts)
        return replace(self, peak=self.peak - size, at_peak=at_peak)

    @staticmethod
    def joined(sections: Sequence["Section"]) -> "Section":
        """Return consecutive sections as one."""
        highest = max(sections, key=lambda each: each.peak)
        flops, calls = Counter[str](), Counter[str]()
        for each in sections:
            flops.update(each.flops)
            calls.update(each.calls)
        return Section(highest.peak, highest.at_peak, flops, calls)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, count the storages that operations create and the FLOPs of the operations.

    The count is exact and repeatable. Scratch space inside an operation and the allocator's rounding are not included.

    Args:
        parts: The networks by the name of their part.

    Attributes:
        now: Bytes of the tensors that exist now.
        alive: `now` by part.
        peak: Largest value of `now` so far.
        at_peak: `peak` by part.
        flops: Floating-point operations by part; a multiply-add counts as two.
        calls: Number of forward calls by part, including recomputation.
    """

    def __init__(self, parts: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._restart()
        self._parts = dict(parts or {})
        self._entered: list[str] = []
        self._handles: list[Any] = []

    def _restart(self) -> None:
        self.now = self.peak = 0
        self.alive: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

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
        for storage in _storages(result):
            if storage._cdata not in old:
                old.add(storage._cdata)
                self._add(self.part, storage)
                self._compare(self.now, self.alive)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops[self.part] += int(count(*args, **kwargs, out_val=result))
        return result

    @property
    def hooks(self) -> set[int]:
        """Numbers of the hooks that tell which part is running."""
        return {handle.id for handle in self._handles}

    @property
    def part(self) -> str:
        """The part whose forward call is running."""
        return self._entered[-1] if self._entered else OTHER

    def add(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that no operation has created; the peak, which a section includes, is not changed."""
        self._add(part, tensor.untyped_storage())

    def repeat(self, section: Section) -> None:
        """Count the operations of a section, from which no tensors remain, once more."""
        self._compare(self.now + section.peak, self.alive, section.at_peak)
        self.flops.update(section.flops)
        self.calls.update(section.calls)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context, count from zero; tensors that are created in it must not outlive it."""
        before = (self.now, self.peak, self.alive, self.at_peak, self.flops, self.calls)
        self._restart()
        try:
            yield
        finally:
            self.now, self.peak, self.alive, self.at_peak, self.flops, self.calls = before

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Within this context, operations outside all forward calls belong to a part."""
        before, self._entered = self._entered, [part]
        try:
            yield
        finally:
            self._entered = before

    def cut(self) -> Section:
        """Return the section since the previous cut, relative to zero, and begin another."""
        section = Section(self.peak, self.at_peak, self.flops, self.calls)
        self.peak, self.at_peak = self.now, Counter(self.alive)
        self.flops, self.calls = Counter(), Counter()
        return section

    def _compare(self, size: int, *parts: Mapping[str, int]) -> None:
        if size > self.peak:
            self.peak, self.at_peak = size, Counter()
            for each in parts:
                self.at_peak.update(each)

    def _add(self, part: str, storage: Any) -> None:
        size = storage.nbytes()
        self.now += size
        self.alive[part] += size
        weakref.finalize(storage, self._free, part, size)

    def _free(self, part: str, size: int) -> None:
        self.now -= size
        self.alive[part] -= size

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
