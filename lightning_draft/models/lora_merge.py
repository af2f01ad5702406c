"""Merging of a LoRA file into the weights of its pipeline."""

import os
from pathlib import Path
from typing import Any

import torch

from lightning_draft.arguments import finite
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.loading import check_replaceable, load_pipeline, save_pipeline
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.models.scale_schedule import schedule_of


@torch.no_grad()
def merge_lora(file: LoRAFile, folder: str | os.PathLike[str], scale: float = 1.0) -> None:
    """Write the pipeline with `W + scale dW` in place of its weights, as a folder that `from_pretrained` opens.

    The pipeline is loaded in float32. Its `training.json` contains the metadata of the file.

    Args:
        file: From `read_lora`.
        folder: The folder to write; an existing pipeline is replaced when the new one is complete.
        scale: Strength of the LoRA.

    Raises:
        ConfigurationError: The scale is not finite, the file has a scale schedule, or the folder has other content than
            a pipeline.
    """
    finite("scale", scale, "write a number such as 0.8")
    if schedule_of(file.metadata) is not None:
        raise ConfigurationError(
            f"{file.path} has a scale schedule, and merged weights have one scale; write `lightning-draft lora anneal "
            f"FILE --schedule power_0`, which makes the scale constant, and merge the result"
        )
    check_replaceable(Path(folder))
    base, family = file.base, file.base.family
    dtypes = dict.fromkeys(family.networks, torch.float32)
    pipeline: Any = load_pipeline(family, base.pretrained, dtypes, base.pretrained_config)
    for component, layers in file.updates.items():
        network = getattr(pipeline, component)
        for layer, update in layers.items():
            network.get_submodule(layer).weight += scale * update.dense().float()
    metadata = {**file.metadata, "base": base.name, "merged_scale": str(scale)}
    save_pipeline(pipeline, Path(folder), family, {}, metadata)
