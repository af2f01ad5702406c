"""Count the network passes of a model."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_draft.models.base import DiffusionModel


class PassCounter:
    """Count the passes of a model's denoiser with hooks, which change no value and no gradient.

    A pass is one forward or one backward pass for one sample: a batch of `B` counts `B`, and a batch that contains both
    branches of classifier-free guidance counts `2 B`. Recomputed forward passes are counted: a recomputed step when the
    network is called again, and recomputed blocks as one forward pass when the gradient arrives at the network's
    output.

    Attributes:
        forwards: Forward passes since `start`.
        backwards: Backward passes since `start`.
        active: Whether passes are counted. A call made while this is true is counted completely, including its backward
            pass.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0
        self.active = False
        self._handles: list[RemovableHandle] = []

    def attach(self, model: DiffusionModel) -> None:
        """Register the hooks on the model's denoiser."""

        def before(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Counted before the call, because a recomputed call ends early, once the backward pass has its activations.
            if self.active:
                self.forwards += _batch(args, kwargs)

        def after(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.active:
                self._count_backward(output, _batch(args, kwargs), model.block_checkpointing)

        self._handles = [
            model.denoiser.register_forward_pre_hook(before, with_kwargs=True),
            model.denoiser.register_forward_hook(after, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def start(self) -> None:
        """Count from 0."""
        self.forwards = self.backwards = 0
        self.active = True

    def _count_backward(self, output: Any, samples: int, recomputed: bool) -> None:
        def count(gradient: Tensor) -> None:
            self.backwards += samples
            self.forwards += samples if recomputed else 0

        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if tensors:
            tensors[0].register_hook(count)  # type: ignore[no-untyped-call]


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the batch size of the network's first argument, passed by position or by name."""
    return len(next(iter((*args, *kwargs.values()))))
