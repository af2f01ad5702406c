"""Open pipelines from single files in the layout of the models' original code."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import skeleton
from lightning_draft.models.families import FAMILIES, class_for_layout, class_for_pipeline
from lightning_draft.models.family import Family
from lightning_draft.text import first_line
from lightning_draft.weightless import is_without_weights

_VAE = ("first_stage_model.", "vae.")
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
_OWN_LAYOUTS = {
    "pixart": ("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight"),
    "qwen_image": ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
}
"""Keys of architectures that diffusers does not recognize, or takes for another one (PixArt for Sana)."""
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def open_single_file(family: Family, file: Path, dtypes: Mapping[str, torch.dtype], config: str | None) -> Any:
    """Open a pipeline from a `.safetensors` file; networks that the file lacks are read from `config`.

    Within `without_weights` only the file's header is read.

    Args:
        family: The family.
        file: The file.
        dtypes: Dtype of the weights of each network, by name.
        config: The folder or hub id of a pipeline with the same architecture; by default its configuration comes from
            the hub.

    Raises:
        ConfigurationError: The file is of another family, is damaged, or lacks networks without `config`.
    """
    if file.suffix != ".safetensors":
        raise ConfigurationError(f"{file} is not a .safetensors file; convert it, or give a diffusers pipeline folder")
    _check_family(family, file)
    if family.single_file is None:
        raise ConfigurationError(
            f"{file} is a single file, and single files of {family.title} usually lack the text encoders; give a "
            f"diffusers pipeline folder, or a hub id such as {family.example}"
        )
    absent = _absent(family, file)
    if absent and config is None:
        raise ConfigurationError(
            f"{file} has no {' and no '.join(absent)}; set pretrained_config to a complete pipeline from which they "
            f"are read, such as {family.example}"
        )
    try:
        if is_without_weights():
            return _without_weights(family, config or _default_config(file), dtypes)
        return _with_weights(family, file, dtypes, config, absent)
    except (*_FAILURES, SingleFileComponentError) as error:
        raise ConfigurationError(
            f"{file} could not be opened as a {family.title} checkpoint ({first_line(error)}); without a connection, "
            "set pretrained_config to the folder of a pipeline with the same architecture"
        ) from error


def _with_weights(
    family: Family, file: Path, dtypes: Mapping[str, torch.dtype], config: str | None, absent: Sequence[str]
) -> Any:
    arguments = {**(family.single_file or {}), **({} if config is None else {"config": config})}
    common = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
    if config is not None:
        arguments |= _networks_of(config, absent, family)
    pipeline = family.pipeline_class.from_single_file(str(file), dtype=common, **arguments)
    for name, dtype in dtypes.items():
        nn.Module.to(getattr(pipeline, name), dtype)
    return pipeline


def _without_weights(family: Family, config: str, dtypes: Mapping[str, torch.dtype]) -> Any:
    index = family.pipeline_class.load_config(config)
    missing = {part: None for part, kind in index.items() if kind == [None, None]}
    options = {**missing, **family.unused, **skeleton.networks(family, config, dtypes)}
    return family.pipeline_class.from_pretrained(config, **options)


def _default_config(file: Path) -> str:
    """Return the hub id from which diffusers reads the configuration of a single file."""
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout_of(file)]["pretrained_model_name_or_path"])


def layout_of(file: Path) -> str:
    """Return diffusers' name of a single file's architecture, such as `v1` or `xl_base`, from its header.

    It is `unknown` for a file of another kind, such as a LoRA; for diffusers that is `v1`.
    """
    shapes = _shapes(file)
    layout: str = infer_diffusers_model_type({k: torch.empty(shape, device="meta") for k, shape in shapes.items()})
    names = {key.removeprefix("model.diffusion_model.") for key in shapes}
    own = next((name for name, keys in _OWN_LAYOUTS.items() if names.issuperset(keys)), None)
    if own is not None:
        return own
    is_stable_diffusion = any(key.startswith("model.diffusion_model.input_blocks.") for key in shapes)
    return "unknown" if layout == "v1" and not is_stable_diffusion else layout


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigurationError(
            f"{file} is damaged or not a safetensors file ({first_line(error)}); copy or download it again"
        ) from error


def _check_family(family: Family, file: Path) -> None:
    layout = layout_of(file)
    other = class_for_layout(layout)
    if other != class_for_pipeline(family.pipeline_name):
        if layout == "unknown":
            raise ConfigurationError(
                f"{file} is not a checkpoint of a known model; give one of {family.title} or a pipeline folder (a LoRA "
                "file is for lora.init)"
            )
        raise ConfigurationError(f"{file} is a {layout} checkpoint and not one of {family.title}; {_advice(other)}")


def _advice(other: str | None) -> str:
    if other is None:
        return "give a file of a supported family"
    right: Family = getattr(import_module(FAMILIES[other].module), other).family
    return f"open {'a pipeline folder of it' if right.single_file is None else 'it'} with {other}"


def _absent(family: Family, file: Path) -> list[str]:
    """Return the names of the networks that a file lacks, such as all but the transformer in files of FLUX.1."""
    prefixes = {"vae": _VAE, **dict.fromkeys(family.text_encoders, _TEXT)}
    keys = list(_shapes(file))
    return [name for name, kinds in prefixes.items() if not any(key.startswith(kinds) for key in keys)]


def _networks_of(config: str, names: Sequence[str], family: Family) -> dict[str, Any]:
    index = family.pipeline_class.load_config(config) if names else {}
    return {name: _class(*index[name]).from_pretrained(config, subfolder=name) for name in names}


def _class(library: str, name: str) -> Any:
    return getattr(import_module(library), name)
