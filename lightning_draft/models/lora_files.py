"""LoRA files: written in the format of diffusers, and read in the formats of diffusers, peft and kohya's scripts."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.family import Family
from lightning_draft.models.lora import ADAPTER

_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a middle factor (LoCon with Tucker decomposition)",
    ".diff": "full weight differences",
}
_KOHYA = ("lora_unet_", "lora_te")


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA file for one network.

    Args:
        path: The file.
        factors: `A` of shape `(rank, in)` and `B` of shape `(out, rank)`, or those of convolutions, by layer.
        scales: The factor of `B A`, by layer.
    """

    path: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(a) for a, _ in self.factors.values())

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return sorted(self.factors)


def save(
    network: Any,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    family: Family,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a file in diffusers' format, which the pipeline's `load_lora_weights` opens.

    Args:
        network: Network with adapters.
        path: Ends in `.safetensors`; missing folders are created.
        metadata: Text for the file's header.
        family: Of the pipeline.
        values: The adapters by their names in the network, if the network holds only a shard of them.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"{path} must end in .safetensors, or diffusers does not find it")
    if values is None:
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    else:  # peft would look for these names in a network whose modules FSDP has renamed
        state = {name.replace(f".{ADAPTER}.", "."): value for name, value in values.items()}
    tensors = {f"{family.denoiser}.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}
    config = {f"{family.denoiser}.{key}": value for key, value in network.peft_config[ADAPTER].to_dict().items()}
    header = {
        **metadata,
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted, indent=2, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=header)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
    partial.replace(path)


def read(path: str | os.PathLike[str], family: Family, network: Any) -> LoRAFile:
    """Read a LoRA file.

    Args:
        path: A `.safetensors` file in the format of diffusers, old or new, peft, or kohya's scripts.
        family: Of the pipeline.
        network: The denoiser.

    Raises:
        ConfigurationError: The file does not exist, is damaged, has values that are not finite, is of another kind
            (DoRA, LoKr), or adapts something other than the denoiser.
    """
    file = Path(path)
    keys, metadata = check(file)
    alphas: dict[str, float] = {}
    if any(key.startswith(f"{family.denoiser}.") and ".lora_A." in key for key in keys):
        state = _read_all(file)
    else:
        state, alphas, metadata = _convert(file, family, network, metadata)
    state, alphas = _split_alphas(state, alphas)
    state = _of_denoiser(state, file, family.denoiser)
    settings = {key.removeprefix(f"{family.denoiser}."): value for key, value in metadata.items()}
    if settings.get("use_dora"):
        raise _unsupported(file, "DoRA")
    factors = {layer: _factors(state, layer, file) for layer in sorted({key.rsplit(".", 2)[0] for key in state})}
    alphas = {key.removeprefix(f"{family.denoiser}."): value for key, value in alphas.items()}
    return LoRAFile(
        file, factors, {layer: _scale(layer, len(a), alphas, settings) for layer, (a, _) in factors.items()}
    )


def check(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the names of a LoRA file's tensors and peft's settings from its header.

    Raises:
        ConfigurationError: The file does not exist, is not a safetensors file, or contains no LoRA of a supported kind.
    """
    if not file.is_file():
        raise ConfigurationError(f"there is no LoRA file {file}; give the path of a .safetensors file")
    try:
        with safe_open(file, framework="pt") as content:
            keys = list(content.keys())
            header = content.metadata() or {}
    except SafetensorError as error:
        raise ConfigurationError(f"{file} is damaged or not a safetensors file: {error}; copy it again") from error
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in key for key in keys)), None)
    if kind is not None:
        raise _unsupported(file, kind)
    if not any("lora" in key for key in keys):
        raise ConfigurationError(f"{file} contains no LoRA: none of its tensors has lora in its name; give a LoRA file")
    settings: dict[str, Any] = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return keys, settings


def _read_all(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118


def _convert(
    file: Path, family: Family, network: Any, metadata: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any]]:
    """Read a file in another format through the pipeline's own converter, and return peft's names."""
    reader = getattr(family.pipeline_class, "lora_state_dict", None)
    if reader is None:
        raise ConfigurationError(
            f"{file} is not in diffusers' format, and {family.pipeline_name} converts no other format; give a file "
            f"whose tensors have names such as {family.denoiser}.<layer>.lora_A.weight"
        )
    is_sdxl = network.config.get("addition_embed_type") == "text_time"  # kohya numbers its blocks differently
    options = {"unet_config": network.config} if is_sdxl else {}
    try:
        state, *alphas, metadata = reader(
            str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True, **options
        )
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigurationError(
            f"{file} cannot be read as a LoRA of {family.title} ({str(error)[:200]}); give one that was trained on it"
        ) from error
    converted = state if any("lora_A" in key for key in state) else convert_unet_state_dict_to_peft(state)
    return converted, dict((alphas[0] or {}) if alphas else {}), metadata or {}


def _split_alphas(state: Mapping[str, Any], alphas: Mapping[str, float]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Separate alphas from factors, and name the alphas by layer.

    diffusers' reader names the alphas of attention layers `attn1.processor.to_k_lora.down.weight.alpha`.
    """
    own = {key: float(value) for key, value in state.items() if key.endswith(".alpha")}
    named = {}
    for key, value in {**own, **alphas}.items():
        weight = key.removesuffix(".alpha").removesuffix(".weight")
        (converted,) = convert_unet_state_dict_to_peft({f"{weight}.": None})
        layer = re.sub(r"\.lora_A$", "", converted.removesuffix("."))
        named[layer.replace(".processor.", ".")] = value
    return {key: value for key, value in state.items() if key not in own}, named


def _of_denoiser(state: Mapping[str, Tensor], file: Path, denoiser: str) -> dict[str, Tensor]:
    others = sorted(key for key in state if not key.startswith(f"{denoiser}."))
    if others:
        raise ConfigurationError(
            f"{file} also adapts something other than the denoiser ({others[0]}), which is not supported; give a LoRA "
            "file of the denoiser only"
        )
    return {key.removeprefix(f"{denoiser}.").replace(".processor.", "."): value for key, value in state.items()}


def _factors(state: Mapping[str, Tensor], layer: str, file: Path) -> tuple[Tensor, Tensor]:
    try:
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
    except KeyError as error:
        raise ConfigurationError(
            f"{file} is incomplete: {layer} has no {str(error.args[0]).rsplit('.', 2)[-2]}; copy it again"
        ) from error
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ConfigurationError(
            f"{file} has values that are not finite, first in {layer}, because training diverged; use an earlier file"
        )
    return a, b


def _scale(layer: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """Return the factor of a layer's `B A`; a missing alpha is the rank, as in diffusers."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    pattern = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    default = settings.get("lora_alpha", rank) if pattern is None else pattern
    alpha = float(alphas.get(layer, default))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _unsupported(file: Path, kind: str) -> ConfigurationError:
    return ConfigurationError(
        f"{file} is {kind}, which is not supported; give a plain LoRA file, or merge it into its base model with the "
        "tool that created it, and give that pipeline as pretrained"
    )
