"""The part of a LoRA for frozen text encoders: added to their weights at a scale that can be changed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora import shortened
from lightning_draft.models.lora_files import Updates
from lightning_draft.models.lora_update import Update


class TextUpdates:
    """Updates of text encoders; their weights become `W + scale dW`, with `W` kept on the CPU.

    Args:
        encoders: The text encoders by their names in the pipeline.
        updates: Updates by component and layer; by default none.
        path: Path of the file, for messages.

    Attributes:
        updates: The updates.
        scale: The current scale, initially 1.

    Raises:
        ConfigurationError: An encoder lacks a layer, or the layer has another shape.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], updates: Mapping[str, Updates], path: Path | None = None
    ) -> None:
        self.updates = updates
        self.scale = 0.0
        self._layers: list[tuple[Any, Update, Tensor]] = []
        for component, layers in updates.items():
            own = dict(encoders[component].named_modules())
            foreign = [layer for layer, update in layers.items() if not _fits(own.get(layer), update)]
            if foreign:
                raise ConfigurationError(
                    f"{path} is a LoRA for another model: {len(foreign)} of its {len(layers)} layers of {component} "
                    f"are not in this model, such as {shortened(foreign, 2)}; give a file that was trained on this "
                    "model"
                )
            for layer, update in layers.items():
                module: Any = own[layer]
                self._layers.append((module, update, module.weight.detach().to("cpu", copy=True)))
        self._set(1.0)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within this context, the updates are multiplied by `scale`; scales of nested contexts are multiplied."""
        before = self.scale
        try:
            self._set(scale * before)
            yield
        finally:
            self._set(before)

    def release(self) -> None:
        """Drop the weights, so that the encoders can be freed."""
        self._layers = []

    @torch.no_grad()
    def _set(self, scale: float) -> None:
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


def _fits(module: Any, update: Update) -> bool:
    shape = (len(update.b), *update.a.shape[1:])
    return isinstance(module, nn.Linear) and tuple(module.weight.shape) == shape
