"""The part of a LoRA for frozen text encoders: added to their weights at a scale that can be changed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora_content import Updates
from lightning_draft.models.lora_update import Update


class TextUpdates:
    """Updates of text encoders; their weights become `W + scale dW`, with `W` stored on the CPU.

    Args:
        encoders: The text encoders by their names in the pipeline.
        updates: Updates by component and layer, which the encoders have; by default none.

    Attributes:
        updates: The updates.
        scale: The current scale, initially 0.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], updates: Mapping[str, Updates]) -> None:
        self.updates = updates
        self.scale = 0.0
        self._layers: list[tuple[Any, Update, Tensor]] = []
        for component, layers in updates.items():
            for layer, update in layers.items():
                module: Any = encoders[component].get_submodule(layer)
                self._layers.append((module, update, module.weight.detach().to("cpu", copy=True)))

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within this context, the updates are multiplied by `scale`; scales of nested contexts are multiplied."""
        before = self.scale
        try:
            self.set_scale(scale * before)
            yield
        finally:
            self.set_scale(before)

    def release(self) -> None:
        """Drop the weights, so that the encoders can be freed."""
        self._layers = []

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the weights to `W + scale dW`."""
        if scale == self.scale:
            return
        self.scale = scale
        for module, update, original in self._layers:
            if module.weight.shape != original.shape:
                raise ConfigurationError(
                    "the text encoders' part of a LoRA cannot be scaled if their weights are sharded over processes; "
                    "set the Trainer's strategy to ddp, or precompute the prompts"
                )
            value = original if scale == 0 else original.float() + scale * update.dense().float().cpu()
            module.weight.copy_(value)
