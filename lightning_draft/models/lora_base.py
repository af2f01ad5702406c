"""Read LoRA files together with their base model, and convert them."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora_files, lora_writing
from lightning_draft.models.families import FAMILIES
from lightning_draft.models.loading import is_local, opener, public_name
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.models.lora_edit import resize_lora
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.weightless import without_weights


def read_lora(path: str | os.PathLike[str], base: str | None = None) -> LoRAFile:
    """Read a LoRA file; only the configuration files of the base model are read, not its weights.

    Args:
        path: A `.safetensors` file in the format of diffusers, old or new, peft, kohya's scripts or ComfyUI.
        base: The base model, as for `PipelineModel`; by default the one that the header of the file names.

    Raises:
        ConfigurationError: The file does not exist, is damaged, has values that are not finite, is of another kind
            (DoRA, LoKr), or does not fit the model; or the model is not known or cannot be opened.
    """
    return read_loras([path], base)[0]


def read_loras(paths: Sequence[str | os.PathLike[str]], base: str | None = None) -> list[LoRAFile]:
    """Read LoRA files of one base model, by default the first one that a header names; see `read_lora`."""
    files = [Path(path).expanduser() for path in paths]
    with without_weights():
        model = open_base(files, base)
    return [model.read_lora(file) for file in files]


def convert_lora(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: lora_writing.Format = "diffusers",
    *,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    base: str | None = None,
) -> float:
    """Write a LoRA file in another format, precision or rank.

    Args:
        source: The file, in any format that `read_lora` reads.
        target: The file to write, which ends in `.safetensors`.
        form: The format, `diffusers` or `comfy`.
        dtype: Dtype of the factors.
        rank: Rank of all layers, by singular value decomposition; by default the ranks do not change.
        base: The base model; by default the one that the header of the file names.

    Returns:
        The relative error of the new rank, `sqrt(sum |dW - dW'|^2 / sum |dW|^2)`; 0 if it does not change.
    """
    file, error = read_lora(source, base), 0.0
    if rank is not None:
        file, error = resize_lora(file, rank)
    lora_writing.write_lora(file, target, form, dtype)
    return error


def open_base(
    files: Sequence[Path], given: str | None = None, size: tuple[int | None, int | None] = (None, None)
) -> PipelineModel:
    """Return the base model, without adapters.

    Args:
        files: LoRA files.
        given: The model that the user gave; by default that in the header of the first file that names one.
        size: Height and width of the images in pixels; by default those for which the model was trained.

    Raises:
        ConfigurationError: No header names a base model, or a file or the model cannot be opened.
    """
    named = {file: header["base"] for file in files if (header := lora_files.check(file)[1]).get("base")}
    if given is None and not named:
        raise ConfigurationError(f"{files[0]} does not name its base model; write --model NAME")
    if given is None:
        pretrained, options = _located(*next(iter(named.items())))
    else:
        pretrained, options = given, _options(_recorded(files[0], public_name(given))) if files else {}
    kind = opener(pretrained) or "StableDiffusion"
    kind_class = getattr(import_module(FAMILIES[kind].module), kind)
    model: PipelineModel = kind_class(pretrained, lora=None, height=size[0], width=size[1], **options)
    return model


def _located(file: Path, name: str) -> tuple[str, Mapping[str, Any]]:
    """Return `pretrained` of the base model that the header of a file names, and the options with which it is opened.

    A header has no local folders: for a local base model the config of the run that wrote the file is read.
    """
    if recorded := _recorded(file, name):
        return str(recorded["pretrained"]), _options(recorded)
    if is_local(name) and not Path(name).expanduser().exists():
        raise ConfigurationError(
            f"{file} was trained on {name}, which is not here: headers do not contain local folders; write --model and "
            "the pipeline's folder, file or hub id"
        )
    return name, {}


def _options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return which networks a recorded model has."""
    return {name: recorded[name] for name in ("pretrained_config", "omit") if recorded.get(name)}


def _recorded(file: Path, name: str) -> Mapping[str, Any]:
    """Return the model's arguments in the config of the run that wrote a file; empty if the base model is another."""
    config = next((c for c in (file.parent.parent / "config.yaml", file.parent / "config.yaml") if c.is_file()), None)
    found = None if config is None else _with_pretrained(yaml.safe_load(config.read_text(encoding="utf-8")))
    return found if found is not None and public_name(found["pretrained"]) == name else {}


def _with_pretrained(content: Any) -> Mapping[str, Any] | None:
    """Return the first mapping in a config that has the key `pretrained`."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("pretrained"), str):
        return content
    return next((found for value in content.values() if (found := _with_pretrained(value)) is not None), None)
