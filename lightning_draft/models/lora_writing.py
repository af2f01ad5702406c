"""Write LoRA files for diffusers and ComfyUI, always with alphas."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.models.family import Family
from lightning_draft.models.lora import ADAPTER
from lightning_draft.models.lora_content import LoRAFile, Updates
from lightning_draft.models.lora_names import ComfyNames, with_text_model
from lightning_draft.models.lora_update import Update

Format = Literal["diffusers", "comfy"]


def adapters_of(network: Any, values: Mapping[str, Tensor] | None = None) -> dict[str, Update]:
    """Return the updates of a network's adapters, by layer.

    Args:
        network: Network with adapters.
        values: The adapters by their names in the network, if the network contains only a shard of them.
    """
    config = network.peft_config[ADAPTER]
    if values is None:
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    else:  # peft would look for these names in a network whose modules FSDP has renamed
        state = {name.replace(f".{ADAPTER}.", "."): value for name, value in values.items()}
    layers = sorted({name.rsplit(".", 2)[0] for name in state})
    scale = config.lora_alpha / config.r
    return {layer: Update(state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"], scale) for layer in layers}


def write(
    path: str | os.PathLike[str],
    updates: Mapping[str, Updates],
    metadata: Mapping[str, str],
    family: Family,
    config: Any,
    form: Format = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA file.

    The diffusers format has peft's names, and ranks and alphas in the header; the pipeline's `load_lora_weights` opens
    it. The other format has the names that ComfyUI reads and a tensor `alpha` for each layer. Alpha equals the rank and
    the scale is part of `B`, because some readers ignore alphas.

    Args:
        path: The file, which ends in `.safetensors`; missing folders are created.
        updates: Updates by component of the pipeline and layer.
        metadata: Text for the header.
        family: The family of the pipeline.
        config: Config of the denoiser.
        form: The format, `diffusers` or `comfy`.
        dtype: Dtype of the factors.

    Raises:
        ConfigurationError: The family has no names in ComfyUI, a value is not finite in this dtype, or the file cannot
            be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"{path} must end in .safetensors, or diffusers does not find it")
    if form == "comfy":
        tensors, settings = _comfy_tensors(updates, comfy_names(family), family.denoiser, config), {}
        header = {**metadata, **_kohya_fields(updates[family.denoiser], metadata, comfy_names(family), config)}
    else:
        tensors, settings = _diffusers_tensors(updates), adapter_settings(updates)
        header = {**metadata, LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    prepared = {
        name: value.detach().to("cpu", torch.float32 if name.endswith(".alpha") else dtype).contiguous()
        for name, value in tensors.items()
    }
    alphas = {
        f"alpha of {name}": torch.tensor(update.alpha) for each in updates.values() for name, update in each.items()
    }
    _check_finite({**prepared, **alphas}, path, dtype)
    with atomic_path(path) as partial:
        save_file(prepared, partial, metadata={**header, "format": "pt"})


def write_lora(
    file: LoRAFile,
    path: str | os.PathLike[str],
    form: Format = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA file that was read or computed; its header has the metadata and the name of the base model.

    Args:
        file: From `read_lora`, `scale_lora`, `resize_lora`, `mix_loras` or `anneal_lora`.
        path: The file to write, which ends in `.safetensors`; missing folders are created.
        form: `diffusers`, or `comfy` for the names that ComfyUI, Forge and AUTOMATIC1111 read.
        dtype: Dtype of the factors.

    Raises:
        ConfigurationError: The family has no names in ComfyUI, a value is not finite in this dtype, or the file cannot
            be written.
    """
    metadata = {**file.metadata, "base": file.base.name}
    write(path, file.updates, metadata, file.base.family, file.base.config, form, dtype)


def _check_finite(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Check that a file can be read again, because files with other values are rejected."""
    name = next((name for name, value in tensors.items() if not value.isfinite().all()), None)
    if name is not None:
        kind = str(dtype).removeprefix("torch.")
        raise ConfigurationError(
            f"{path} was not written: {name} is not finite in {kind}, whose largest number is "
            f"{torch.finfo(dtype).max:g}; choose a smaller scale, or another dtype such as float32"
        )


def comfy_names(family: Family) -> ComfyNames:
    """Return the names of a family's layers in ComfyUI.

    Raises:
        ConfigurationError: The names are not known.
    """
    if family.comfy is None:
        raise ConfigurationError(f"the layer names of {family.title} in ComfyUI are not known; use format diffusers")
    return family.comfy


def adapter_settings(updates: Mapping[str, Updates]) -> dict[str, Any]:
    """Return peft's settings of each component: `r`, `lora_alpha`, `target_modules`, and the layers that differ."""
    settings: dict[str, Any] = {}
    for component, layers in updates.items():
        (rank, alpha), _ = Counter((update.rank, update.alpha) for update in layers.values()).most_common(1)[0]
        own = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(layers),
            "rank_pattern": {layer: update.rank for layer, update in layers.items() if update.rank != rank},
            "alpha_pattern": {layer: update.alpha for layer, update in layers.items() if update.alpha != alpha},
        }
        settings.update({f"{component}.{key}": value for key, value in own.items()})
    return settings


def _diffusers_tensors(updates: Mapping[str, Updates]) -> dict[str, Tensor]:
    tensors = {}
    for component, layers in updates.items():
        for layer, update in layers.items():
            name = f"{component}.{with_text_model(component, layer)}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = update.a, update.b
    return tensors


def _comfy_tensors(updates: Mapping[str, Updates], names: ComfyNames, denoiser: str, config: Any) -> dict[str, Tensor]:
    down, up = names.suffixes
    tensors = {}
    for component, layers in updates.items():
        for layer, update in layers.items():
            key = names.key(component, layer, config if component == denoiser else None)
            tensors[f"{key}{down}"], tensors[f"{key}{up}"] = update.a, update.scale * update.b
            tensors[f"{key}.alpha"] = torch.tensor(float(update.rank))
    return tensors


def _kohya_fields(updates: Updates, metadata: Mapping[str, str], names: ComfyNames, config: Any) -> dict[str, str]:
    """Return the fields that viewers of LoRA files read, as kohya's scripts and the modelspec standard name them."""
    version, architecture = names.architecture(config)
    rank = max(update.rank for update in updates.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_sd_model_name": metadata.get("base", ""),
        "ss_new_sd_model_hash": metadata.get("base_sha256", ""),
        "ss_steps": metadata.get("step", ""),
        "ss_training_comment": _comment(metadata),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": metadata.get("title", "LoRA"),
        "modelspec.description": _comment(metadata),
    }


def _comment(metadata: Mapping[str, str]) -> str:
    parts = {key: metadata[key] for key in ("method", "reward", "sampler", "scores") if key in metadata}
    return "; ".join(f"{key}: {value}" for key, value in parts.items())
