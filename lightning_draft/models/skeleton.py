"""The networks of a pipeline from their configuration files alone, with random or no values."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_draft.models.family import Family
from lightning_draft.models.quantization import Quantization, replace_linear_layers
from lightning_draft.weightless import shapes_only


def networks(
    family: Family, source: str, dtypes: Mapping[str, torch.dtype], quantization: Quantization | None = None
) -> dict[str, nn.Module]:
    """Build the networks of a pipeline without their weights.

    Args:
        family: The family of the pipeline.
        source: Folder or hub id.
        dtypes: Dtype of the weights of each network, by its name.
        quantization: How the denoiser and the text encoders are quantized.
    """
    index = family.pipeline_class.load_config(source)
    with shapes_only():
        found = {name: _network(source, name, dtype, *index[name]) for name, dtype in dtypes.items() if name in index}
        for name, network in found.items():
            if quantization is not None and name != family.vae:
                replace_linear_layers(network, quantization)
    return found


def _network(source: str, name: str, dtype: torch.dtype, library: str, class_name: str) -> nn.Module:
    kind: Any = getattr(import_module(library), class_name)
    network: nn.Module
    if library == "diffusers":
        network = kind.from_config(kind.load_config(source, subfolder=name))
    else:
        network = kind(kind.config_class.from_pretrained(source, subfolder=name))
    return nn.Module.to(network, dtype)
