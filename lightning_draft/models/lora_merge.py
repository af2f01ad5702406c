"""Merging of a LoRA file into the weights of its pipeline."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_draft.arguments import finite
from lightning_draft.models.loading import check_replaceable, load_pipeline, save_pipeline
from lightning_draft.models.lora_files import LoRAFile
from lightning_draft.models.pipeline import PipelineModel


@torch.no_grad()
def merge(
    model: PipelineModel,
    file: LoRAFile,
    folder: str | os.PathLike[str],
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the pipeline with `W + scale dW` in place of its weights, as a folder that `from_pretrained` opens.

    Args:
        model: The model, whose pipeline is loaded again in float32; it is not changed and needs no weights.
        file: From `model.read_lora`.
        folder: The folder to write; an existing pipeline is replaced when the new one is complete.
        scale: Strength of the LoRA.
        metadata: Text for `training.json`.

    Raises:
        ConfigurationError: The scale is not finite, or the folder has other content than a pipeline.
    """
    finite("scale", scale, "write a number such as 0.8")
    check_replaceable(Path(folder))
    family = model.family
    dtypes = dict.fromkeys(family.networks, torch.float32)
    pipeline: Any = load_pipeline(family, model.source, dtypes, model.pretrained_config)
    for component, layers in {family.denoiser: file.denoiser, **file.encoders}.items():
        network = getattr(pipeline, component)
        for layer, update in layers.items():
            network.get_submodule(layer).weight += scale * update.dense().float()
    save_pipeline(pipeline, Path(folder), family, {}, metadata or {})
