"""Activations of sampling steps that the backward pass recomputes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.arguments import integer_at_least
from lightning_draft.models.base import DiffusionModel


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass recomputes, so that they need not be stored. Gradients do not depend on it.

    Args:
        steps: Recompute the network call of each step, so that the activations of one step are stored at a time.
        blocks: Recompute each block of the network, so that the activations of one block are stored at a time.
        micro_batch_size: Run steps with gradient on slices of this many samples and recompute each slice separately;
            `None` for the whole batch.

    Raises:
        ConfigurationError: `micro_batch_size` is less than 1.
    """

    steps: bool = False
    blocks: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None:
            integer_at_least(
                "micro_batch_size", self.micro_batch_size, 1, "write 1 or more, or null for the whole batch"
            )

    def prepare(self, model: DiffusionModel) -> None:
        """Set whether the next network call of a model with gradient recomputes blocks.

        Raises:
            ConfigurationError: The network has no blocks that can be recomputed.
        """
        model.checkpoint_blocks(self.blocks)

    def call(self, model: DiffusionModel, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Return the result of a function that calls the model; the backward pass recomputes it if it does steps.

        Args:
            model: The diffusion model.
            function: Called with the inputs, in the backward pass again.
            inputs: Tensors.
        """
        self.prepare(model)
        if not self.steps or not torch.is_grad_enabled():
            return function(*inputs)
        output: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        return output

    def slices(self, batch: int) -> list[slice]:
        """Return the slices of a batch of the given size."""
        size = batch if self.micro_batch_size is None else self.micro_batch_size
        return [slice(start, start + size) for start in range(0, batch, size)]
