"""Scale trained LoRA adapters towards the base model."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from lightning_draft.callbacks.ema import all_averages
from lightning_draft.distributed import trainable_parameters


@torch.no_grad()
def shrink_adapters(trainer: L.Trainer, pl_module: L.LightningModule, factor: float) -> None:
    """Scale the update `dW = s B A` of every LoRA layer by scaling `B`, also in the moving average if there is one."""
    everything: list[Mapping[str, Tensor]] = [trainable_parameters(pl_module), *all_averages(trainer)]
    for tensors in everything:
        for name, tensor in tensors.items():
            if is_factor(name):
                tensor.mul_(factor)


def is_factor(name: str) -> bool:
    """Return whether a parameter is the factor `B` of a LoRA layer."""
    return ".lora_B." in name
