"""Read LoRA files in the formats of diffusers, peft, kohya's scripts and ComfyUI."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.family import Family
from lightning_draft.models.lora_content import LoRABase, LoRAFile
from lightning_draft.models.lora_update import Update

_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a middle factor (LoCon with Tucker decomposition)",
    ".diff.": "full weight differences",
    ".diff_b.": "full weight differences",
}
_FACTORS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def read(path: str | os.PathLike[str], base: LoRABase, networks: Mapping[str, nn.Module]) -> LoRAFile:
    """Read a LoRA file.

    Args:
        path: A `.safetensors` file in the format of diffusers, old or new, peft, kohya's scripts or ComfyUI.
        base: The pipeline that it adapts.
        networks: The denoiser and the text encoders, by their names in the pipeline; they may be on the meta device.

    Raises:
        ConfigurationError: The file does not exist, is damaged, has values that are not finite, is of another kind
            (DoRA, LoKr), or adapts something other than these networks.
    """
    file, family = Path(path), base.family
    keys, header = check(file)
    _check_loaded(keys, file, family, networks)
    settings = _settings(header.pop(LORA_ADAPTER_METADATA_KEY, "{}"), file)
    state = _renamed(read_tensors(file), family, networks)
    if state is None:
        if any(key.startswith(f"{family.denoiser}.") and ".lora_A." in key for key in keys):
            state = read_tensors(file)
        else:
            state, settings = _convert(file, family, networks[family.denoiser], settings)
        state = _peft_names(state, family, networks)
    parts = {name: _select(state, name) for name in networks}
    _check_known(state, file, family, parts)
    updates = {name: _updates(part, _select(settings, name), file) for name, part in parts.items() if part}
    if family.denoiser not in updates:
        raise ConfigurationError(f"{file} adapts no layer of the denoiser; give a LoRA file of {family.title}")
    return LoRAFile(file, base, updates.pop(family.denoiser), updates, header)


def check(file: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of a LoRA file's tensors and its header.

    Raises:
        ConfigurationError: The file does not exist, is not a safetensors file, or contains no LoRA of a supported kind.
    """
    if not file.is_file():
        raise ConfigurationError(f"there is no LoRA file {file}; give the path of a .safetensors file")
    try:
        with safe_open(file, framework="pt") as content:
            keys = list(content.keys())
            header = dict(content.metadata() or {})
    except SafetensorError as error:
        raise ConfigurationError(f"{file} is damaged or not a safetensors file: {error}; copy it again") from error
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in f"{key}." for key in keys)), None)
    if kind is not None:
        raise _unsupported(file, kind)
    if not any("lora" in key for key in keys):
        raise ConfigurationError(f"{file} contains no LoRA: none of its tensors has lora in its name; give a LoRA file")
    return keys, header


def _check_loaded(keys: Sequence[str], file: Path, family: Family, networks: Mapping[str, nn.Module]) -> None:
    prefixes = {} if family.comfy is None else family.comfy.prefixes
    for name in family.text_encoders:
        if name not in networks and any(key.startswith((f"{name}.", prefixes.get(name, f"{name}."))) for key in keys):
            raise ConfigurationError(
                f"{file} has a part for {name}, which this model has not loaded; set text.cache to null, and do not "
                f"write {name} in omit"
            )


def _settings(text: str, file: Path) -> dict[str, Any]:
    """Return peft's settings from a header.

    Raises:
        ConfigurationError: They are not a mapping in JSON.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{file} is damaged: {LORA_ADAPTER_METADATA_KEY} in its header is not a mapping in JSON; copy it again"
        )
    return settings


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file."""
    with safe_open(file, framework="pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118


def _renamed(
    state: Mapping[str, Tensor], family: Family, networks: Mapping[str, nn.Module]
) -> dict[str, Tensor] | None:
    """Rename tensors from the names of kohya's scripts to those of peft; return `None` if they have other names."""
    if family.comfy is None or not family.comfy.underscores:
        return None
    places = family.comfy.lookup(family.denoiser, networks)
    if any(key.partition(".")[0] not in places for key in state):
        return None
    renamed = {}
    for key, value in state.items():
        stem, _, factor = key.partition(".")
        component, layer = places[stem]
        renamed[f"{component}.{layer}.{_FACTORS.get(factor, factor)}"] = value
    return renamed


def _convert(
    file: Path, family: Family, network: Any, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file in another format with the pipeline's converter."""
    reader = getattr(family.pipeline_class, "lora_state_dict", None)
    if reader is None:
        raise ConfigurationError(
            f"{file} is not in diffusers' format, and {family.pipeline_name} converts no other format; give a file "
            f"whose tensors have names such as {family.denoiser}.<layer>.lora_A.weight"
        )
    is_sdxl = network.config.get("addition_embed_type") == "text_time"  # kohya numbers its blocks differently
    options = {"unet_config": network.config} if is_sdxl else {}
    try:
        state, *alphas, converted = reader(
            str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True, **options
        )
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigurationError(
            f"{file} cannot be read as a LoRA of {family.title} ({str(error)[:200]}); give one that was trained on it"
        ) from error
    return {**state, **((alphas[0] or {}) if alphas else {})}, converted or settings


def _peft_names(state: Mapping[str, Any], family: Family, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Rename tensors to peft's names; they may have the names of older releases of diffusers."""
    own = f"{family.denoiser}."
    of_denoiser = {key: value for key, value in state.items() if key.startswith(own)}
    others = {key: value for key, value in state.items() if not key.startswith(own)}
    if not any("lora_A" in key for key in of_denoiser):
        of_denoiser = convert_unet_state_dict_to_peft(of_denoiser)
    if others and not any("lora_A" in key for key in others):
        others = convert_state_dict_to_peft(convert_state_dict_to_diffusers(others))
    renamed = {key.replace(".processor.", "."): value for key, value in of_denoiser.items()}
    for key, value in others.items():
        component, _, layer = key.partition(".")
        flat = component in networks and not hasattr(networks[component], "text_model")
        renamed[f"{component}.{layer.removeprefix('text_model.') if flat else layer}"] = value
    return renamed


def _select(content: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}


def _check_known(state: Mapping[str, Any], file: Path, family: Family, parts: Mapping[str, Mapping[str, Any]]) -> None:
    others = sorted(key for key in state if key.partition(".")[0] not in parts)
    if others:
        raise ConfigurationError(
            f"{file} adapts something other than {', '.join(parts)} ({others[0]}); give a LoRA file that was trained "
            f"on {family.title}"
        )


def _updates(state: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> dict[str, Update]:
    if settings.get("use_dora"):
        raise _unsupported(file, "DoRA")
    layers = sorted({key.rsplit(".", 2)[0] for key in state if not key.endswith(".alpha")})
    return {layer: _update(state, layer, settings, file) for layer in layers}


def _update(state: Mapping[str, Any], layer: str, settings: Mapping[str, Any], file: Path) -> Update:
    try:
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
    except KeyError as error:
        raise ConfigurationError(
            f"{file} is incomplete: {layer} has no {str(error.args[0]).rsplit('.', 2)[-2]}; copy it again"
        ) from error
    _check_factors(a, b, layer, file)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ConfigurationError(
            f"{file} has values that are not finite, first in {layer}; training has probably diverged: use an earlier "
            "file"
        )
    try:
        scale = _scale(layer, len(a), state.get(f"{layer}.alpha"), settings)
    except (TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError, re.error):
        scale = math.nan
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ConfigurationError(f"{file} is damaged: {layer} has no valid rank and alpha; copy it again")
    return Update(a, b, scale)


def _check_factors(a: Any, b: Any, layer: str, file: Path) -> None:
    """Check that two factors have the same rank and floating-point values.

    Raises:
        ConfigurationError: They differ in rank, or are quantized.
    """
    if a.dim() < 2 or b.dim() < 2 or len(a) != b.shape[1]:
        raise ConfigurationError(
            f"{file} is damaged: the factors of {layer} have the shapes {tuple(a.shape)} and {tuple(b.shape)}, which "
            "are not of one rank; copy it again"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ConfigurationError(
            f"{file} has {str(a.dtype).removeprefix('torch.')} values in {layer}; quantized LoRA files are not "
            "supported: give one in float32, float16 or bfloat16"
        )


def _scale(layer: str, rank: int, own_alpha: Any, settings: Mapping[str, Any]) -> float:
    """Return the factor of a layer's `B A`; a missing alpha is the rank, as in diffusers."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    pattern = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    default = settings.get("lora_alpha", rank) if pattern is None else pattern
    alpha = float(default if own_alpha is None else own_alpha)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _unsupported(file: Path, kind: str) -> ConfigurationError:
    return ConfigurationError(
        f"{file} is {kind}, which is not supported; give a plain LoRA file, or merge it into its base model with the "
        "tool that created it, and give that pipeline as pretrained"
    )
