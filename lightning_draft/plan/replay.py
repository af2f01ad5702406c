"""Count each kind of network call once, and repeat its memory and cost for all further calls of this kind.

A step of a large model calls the same network for each slice of the batch, and within it many equal blocks. Such a call
is a single operation here: with a gradient it stores one tensor with the size of all that the call stores for the
backward pass, besides its inputs and outputs.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_draft.models.lora import with_current_scales
from lightning_draft.plan.calls import Output, TensorKind, UnknownKindError, leaf_kind, network_kind
from lightning_draft.plan.measure import Call, Variant, new
from lightning_draft.plan.tracker import Tracker

SUPPORTED = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
"""Whether torch, from 2.8 on, tells if the running call is recomputed in the backward pass; else all calls are run."""

Calls = dict[Hashable, Call | None]

_KNOWN: ContextVar[Calls | None] = ContextVar("known", default=None)


@contextmanager
def shared_calls() -> Iterator[None]:
    """Within this context, all plans share the calls that they have measured."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


@contextmanager
def replayed(tracker: Tracker, networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, calls of networks without weights are measured once for each kind of call.

    Args:
        tracker: Counts the operations.
        networks: The networks; one may contain others.
    """
    known = _KNOWN.get()
    replay, chosen = _Replay(tracker, {} if known is None else known), {id(each) for each in networks}
    call = nn.Module.__call__

    def replayed_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if SUPPORTED and id(module) in chosen and _is_plain(module, tracker):
            return replay.call(module, partial(call, module), args, kwargs)
        return call(module, *args, **kwargs)

    nn.Module.__call__ = replayed_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def _is_plain(network: nn.Module, tracker: Tracker) -> bool:
    """Return whether a call of a network runs nothing else, such as hooks that keep its outputs."""
    hooks = {*network._forward_hooks, *network._forward_pre_hooks}
    return "forward" not in vars(network) and hooks <= tracker.hooks


class _Replay:
    """The calls that have been measured."""

    def __init__(self, tracker: Tracker, known: Calls) -> None:
        self.tracker, self._known = tracker, known

    def call(self, network: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return new tensors like the outputs of a call, and count it; run it if its inputs or outputs are not plain.

        Args:
            network: The network.
            run: Calls it.
            args: Its inputs.
            kwargs: Its inputs by name.
        """
        leaves, layout = tree_flatten((args, kwargs))
        autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        state, trained = network_kind(network)
        try:
            inputs = tuple(map(leaf_kind, leaves))
        except UnknownKindError:
            return run(*args, **kwargs)
        kind = (state, repr(layout), inputs, torch.is_grad_enabled(), autocast, self.tracker.part)
        call = self._known.get(kind)
        if kind not in self._known:
            run_as_now = with_current_scales(network, run)
            try:
                call = Call(self.tracker, run_as_now, trained, leaves, layout, self.tracker.part, autocast)
            except UnknownKindError:
                call = None
            self._known[kind] = call
        elif call is not None and call.tracker is not self.tracker:  # another model of this kind
            call.tracker, call.run, call.trained = self.tracker, with_current_scales(network, run), trained
        return run(*args, **kwargs) if call is None else self._repeat(call, leaves, trained)

    def _repeat(self, call: Call, leaves: Sequence[Any], trained: Sequence[nn.Parameter]) -> Any:
        drops = _drops_stored_tensors()
        self.tracker.repeat(call.dropped() if drops else call.forward)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        created = iter(_Repeated.apply(call, len(tensors), *tensors, *trained))  # type: ignore[no-untyped-call]
        if not drops:  # no recomputation ended at the last stored tensor
            self.tracker.repeat(call.rest)
        values = list(leaves)
        for each in call.outputs:
            values.append(next(created) if isinstance(each, Output) else values[each] if type(each) is int else each[0])
        return tree_unflatten(values[len(leaves) :], call.result)


class _Repeated(torch.autograd.Function):
    """A call that is counted and not run."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return new tensors in the shapes of the outputs, and count what the call stores for its backward pass."""
        outputs = tuple(call.create())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each, has in zip(outputs, call.differentiable, strict=True) if not has))
        if any(call.differentiable):
            ctx.call, ctx.trained = call, tensors[count:]
            stored = [new(call.tracker, TensorKind.flat(call.stored), call.creates_in)] if call.stored else []
            inputs = (tensors[n] for n in call.stored_inputs)
            ctx.save_for_backward(*inputs, *stored, *(outputs[n] for n in call.stored_outputs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Repeat the memory and cost of the measured backward pass, and return gradients in the inputs' shapes."""
        stored, call, trained = ctx.saved_tensors, ctx.call, ctx.trained
        given = [each for each, has in zip(gradients, call.differentiable, strict=True) if has]
        wanted = bool(trained) and _is_wanted(ctx.next_functions[-1][0])
        accumulates = wanted and any(each.grad is not None for each in trained)
        part, tracker = call.tracker.part, call.tracker
        outputs = tuple(each is not None for each in given)
        passed = call.backward(
            Variant(outputs, wanted or not trained, accumulates, torch.is_autocast_enabled("cpu"), part)
        )
        tracker.repeat(passed.section)
        known = dict(enumerate(each for each in given if each is not None))
        found: list[Tensor | None] = []
        for each in passed.inputs:
            if each is not None and (each[1] not in known or known[each[1]].shape != each[0].shape):
                known[each[1]] = new(tracker, each[0], part)
            found.append(None if each is None else known[each[1]])
        for parameter, has in zip(trained, passed.parameters, strict=True):
            found.append(new(tracker, TensorKind.of(parameter.data), part) if has else None)
        del stored
        return (None, None, *found)


def _drops_stored_tensors() -> bool:
    """Return whether the backward pass recomputes the running call."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


def _is_wanted(node: Any) -> bool:
    """Return whether the running backward pass computes the gradient of a parameter."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the gradient is returned, not accumulated
        return True
