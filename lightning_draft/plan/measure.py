"""Run a network call apart from the training step, to measure its memory and cost."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_draft.plan.calls import Output, TensorKind, UnknownKindError, copies, output_kinds
from lightning_draft.plan.tracker import Section, Tracker


@dataclass(frozen=True)
class Variant:
    """What a backward pass computes.

    Args:
        outputs: For each output that depends on the parameters or inputs, whether its gradient is given.
        parameters: Whether gradients of parameters are computed.
        accumulates: Whether they are added to existing ones.
        autocast: Whether autocast is enabled.
        part: The part to which its operations belong.
    """

    outputs: tuple[bool, ...]
    parameters: bool
    accumulates: bool
    autocast: bool
    part: str


@dataclass(frozen=True)
class Backward:
    """The backward pass of a call.

    Args:
        section: Its memory, relative to its start, and its cost.
        inputs: For each input, the kind of its gradient and the number of its storage; `None` without gradient.
            Numbers from 0 are those of the given gradients.
        parameters: For each trained parameter, whether it has a gradient.
    """

    section: Section
    inputs: Sequence[tuple[TensorKind, int] | None]
    parameters: Sequence[bool]


@dataclass
class Call:
    """A kind of call, measured when it is needed.

    Args:
        tracker: Counts the operations.
        run: Runs the call.
        trained: Parameters of the network that have a gradient.
        leaves: Inputs of this kind; tensors are new ones.
        layout: Structure of the inputs.
        part: The part in whose forward call it is.
        autocast: Whether autocast is enabled in the forward pass, and its dtype.

    Attributes:
        outputs: The outputs; an integer is the number of an input or an earlier output; others are constants.
        result: Structure of the outputs.
        differentiable: Whether each new output has a gradient.
        creates_in: The part whose operations create the outputs.
        forward: The call until it has stored its last tensor for the backward pass, relative to its start.
        rest: What follows, relative to its end.
        stored: Bytes stored for the backward pass, besides inputs and outputs.
        stored_inputs: Numbers of the inputs that are stored.
        stored_outputs: Numbers of the new outputs that are stored.

    Raises:
        UnknownKindError: An input or output is not plain.
    """

    tracker: Tracker
    run: Callable[..., Any]
    trained: Sequence[nn.Parameter]
    leaves: list[Any]
    layout: TreeSpec
    part: str
    autocast: tuple[bool, torch.dtype]
    _dropped: Section | None = None
    _backward: dict[Variant, Backward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves = copies(self.leaves)
        with self.tracker.apart():
            try:
                self._measure()
                return
            except UnknownKindError:
                pass  # frees the tensors, which must not outlive the context
        raise UnknownKindError

    def create(self) -> list[Tensor]:
        """Return new tensors like the outputs, and count them."""
        created: list[Tensor] = []
        for each in self.new:
            if each.storage < len(created):
                created.append(each.kind.new(created[each.storage]))
            else:
                created.append(new(self.tracker, each.kind, self.creates_in))
        return created

    @property
    def new(self) -> list[Output]:
        """The outputs that are new tensors."""
        return [each for each in self.outputs if isinstance(each, Output)]

    def dropped(self) -> Section:
        """Return the whole call if nothing is stored, because the backward pass recomputes it."""
        if self._dropped is None:
            with self.tracker.apart(), saved_tensors_hooks(_same, _same):
                args, kwargs = tree_unflatten(copies(self.leaves), self.layout)
                result = checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
                self._dropped = self.tracker.cut()
                del result
        return self._dropped

    def backward(self, variant: Variant) -> Backward:
        """Return the backward pass of a call."""
        if variant not in self._backward:
            self._backward[variant] = self._measured_backward(variant)
        return self._backward[variant]

    def _measure(self) -> None:
        """Run the call."""
        tracker, sections, stored = self.tracker, [Section()], {}

        def store(tensor: Tensor) -> Tensor:
            """Store a tensor for the backward pass, and begin a new section of the record."""
            sections.append(tracker.cut())
            storage = tensor.untyped_storage()
            stored[storage._cdata] = weakref.ref(storage)
            return tensor

        args, kwargs = tree_unflatten(self.leaves, self.layout)
        with saved_tensors_hooks(store, _same):
            result = self.run(*args, **kwargs)
        leaves, self.result = tree_flatten(result)
        rest = tracker.cut()
        alive = {data for data, each in stored.items() if each() is not None}
        self.outputs = output_kinds(self.leaves, leaves)
        new = [leaf for leaf, kind in zip(leaves, self.outputs, strict=True) if isinstance(kind, Output)]
        self.differentiable = [each.requires_grad for each in new]
        self.stored_inputs = _stored([leaf for leaf in self.leaves if isinstance(leaf, Tensor)], alive)
        self.stored_outputs = _stored(new, alive)
        self.stored = tracker.now - sum(each.kind.nbytes for n, each in enumerate(self.new) if each.storage == n)
        self.creates_in = max(tracker.alive, key=lambda part: tracker.alive[part], default="")
        self.forward = Section.joined(sections if alive else [*sections, rest])
        self.rest = rest.relative_to(tracker.now, tracker.alive) if alive else Section()

    def _measured_backward(self, variant: Variant) -> Backward:
        before = [parameter.grad for parameter in self.trained]
        try:
            for parameter in self.trained:
                parameter.grad = _like(parameter) if variant.accumulates else None
            with self.tracker.apart(), torch.enable_grad(), saved_tensors_hooks(_same, _same):
                result = _BackwardRun(self, variant).result()
                for parameter in self.trained:
                    parameter.grad = None
                return result
        finally:
            for parameter, gradient in zip(self.trained, before, strict=True):
                parameter.grad = gradient


class _BackwardRun:
    """A backward pass that is run apart from the step."""

    def __init__(self, call: Call, variant: Variant) -> None:
        self.call, self.variant = call, variant
        self.base: tuple[int, Counter[str]] = (0, Counter())
        self.given: list[weakref.ref[Any]] = []
        self.found: list[Tensor | None] = []

    def result(self) -> Backward:
        """Run both passes and return the backward pass."""
        leaves, tracker = copies(self.call.leaves), self.call.tracker
        with tracker.inside(self.call.part):
            start = self._forward(leaves)
        with tracker.inside(self.variant.part), torch.autocast("cpu", enabled=self.variant.autocast):
            if self.variant.parameters:
                start.backward()  # type: ignore[no-untyped-call]
            else:
                wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
                torch.autograd.grad(start, wanted, allow_unused=True)
        return Backward(tracker.cut().relative_to(*self.base), self._inputs(), self._parameters())

    def begin(self, outputs: Sequence[TensorKind]) -> list[Tensor]:
        """Return gradients of the outputs, and begin to count."""
        tracker = self.call.tracker
        gradients = [new(tracker, kind.gradient, tracker.part) for kind in outputs]
        self.given = [weakref.ref(each.untyped_storage()) for each in gradients]
        tracker.cut()
        self.base = (tracker.now, Counter(tracker.alive))
        return gradients

    def _forward(self, leaves: list[Any]) -> Tensor:
        """Run the forward pass on inputs and return a scalar that depends on its outputs."""
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs, self.found = list(leaves), [None] * len(places)
        entered = _Inputs.apply(self, *(leaves[n] for n in places))  # type: ignore[no-untyped-call]
        for n, tensor in zip(places, entered, strict=True):
            inputs[n] = tensor
        args, kwargs = tree_unflatten(inputs, self.call.layout)
        enabled, dtype = self.call.autocast
        with torch.autocast("cpu", enabled=enabled, dtype=dtype, cache_enabled=False):
            outputs = tree_flatten(self.call.run(*args, **kwargs))[0]
        new = [each for each, kind in zip(outputs, self.call.outputs, strict=True) if isinstance(kind, Output)]
        graded = iter(self.variant.outputs)
        pairs = zip(new, self.call.differentiable, strict=True)
        chosen = [each for each, has in pairs if has and next(graded)]
        start: Tensor = _Outputs.apply(self, *chosen)  # type: ignore[no-untyped-call]
        return start

    def _inputs(self) -> list[tuple[TensorKind, int] | None]:
        given = {storage._cdata: n for n, each in enumerate(self.given) if (storage := each()) is not None}
        return [
            None
            if each is None
            else (TensorKind.of(each), given.setdefault(each.untyped_storage()._cdata, len(self.given) + n))
            for n, each in enumerate(self.found)
        ]

    def _parameters(self) -> list[bool]:
        if not self.variant.parameters:
            return [False] * len(self.call.trained)
        if self.variant.accumulates:
            return list(self.call.backward(replace(self.variant, accumulates=False)).parameters)
        return [parameter.grad is not None for parameter in self.call.trained]


class _Inputs(torch.autograd.Function):
    """The inputs of a measured call; keeps their gradients."""

    @staticmethod
    def forward(ctx: Any, run: _BackwardRun, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs, detached; those without a gradient stay so."""
        ctx.set_materialize_grads(False)
        ctx.run, outputs = run, tuple(tensor.detach() for tensor in tensors)
        pairs = zip(outputs, tensors, strict=True)
        ctx.mark_non_differentiable(*(output for output, tensor in pairs if not tensor.requires_grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.run.found = list(gradients)
        return (None,) * (1 + len(gradients))


class _Outputs(torch.autograd.Function):
    """A scalar that depends on the outputs of a measured call; the backward pass begins here."""

    @staticmethod
    def forward(ctx: Any, run: _BackwardRun, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.kinds = run, list(map(TensorKind.of, tensors))
        return torch.zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.run.begin(ctx.kinds))


def new(tracker: Tracker, kind: TensorKind, part: str) -> Tensor:
    """Return a new tensor, and count it."""
    tensor = kind.new()
    tracker.add(tensor, part)
    return tensor


def _like(parameter: Tensor) -> Tensor:
    """Return a new gradient of a parameter, which is not counted."""
    return TensorKind.of(parameter.data).new()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stored(tensors: Sequence[Tensor], storages: set[int]) -> list[int]:
    """Return the numbers of the tensors with one of the storages."""
    return [n for n, each in enumerate(tensors) if each.untyped_storage()._cdata in storages]
