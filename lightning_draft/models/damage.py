"""Find the damage in a pipeline that cannot be opened or used."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.family import Family
from lightning_draft.models.quantization import stored_tensors

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def describe_damage(folder: Path) -> str | None:
    """Describe the first damaged file of a pipeline folder; `None` if all files can be read.

    Args:
        folder: Folder with `model_index.json`.
    """
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            return f"{file} is not valid JSON ({error})"
        if file.name in ("model_index.json", "config.json", "scheduler_config.json") and not isinstance(content, dict):
            return f"{file} contains {type(content).__name__} and not a mapping"
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is truncated or not a safetensors file ({error})"
    index = json.loads((folder / "model_index.json").read_text())
    for name, kind in index.items():
        if isinstance(kind, list) and kind != [None, None] and not (folder / name).is_dir():
            return f"{folder / name} is missing, and model_index.json names it"
    return None


def check_complete(pipeline: Any, family: Family, folder: Path) -> None:
    """Check that tokenizers have a vocabulary, and the files of the denoiser all of its weights.

    The libraries would use an empty vocabulary, and initialize missing weights at random.

    Raises:
        ConfigurationError: Some are missing.
    """
    for tokenizer in sorted(folder.glob("tokenizer*")):
        if tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in _VOCABULARIES):
            raise ConfigurationError(
                f"{tokenizer} has no vocabulary ({', '.join(_VOCABULARIES)}); copy or download it again"
            )
    stored: set[str] = set()
    for file in (folder / family.denoiser).glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            stored |= set(content.keys())
    denoiser = getattr(pipeline, family.denoiser)
    missing = sorted(_names(denoiser) - stored) if stored and denoiser is not None else []
    if missing:
        raise ConfigurationError(
            f"{folder / family.denoiser} lacks {len(missing)} of its weights, such as {missing[0]}; copy or download "
            "it again"
        )


def _names(network: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers that files contain, without the statistics of quantizers."""
    tensors = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    return network.state_dict().keys() & tensors


def check_finite(pipeline: Any, family: Family, source: str) -> None:
    """Check the weights of a pipeline's networks.

    Raises:
        ConfigurationError: Some are NaN or infinite.
    """
    for name in family.networks:
        network = getattr(pipeline, name, None)
        for full_name, parameter in () if network is None else network.named_parameters():
            tensors = [each for each in stored_tensors(parameter) if not each.is_meta]
            if not all(bool(torch.isfinite(each).all()) for each in tensors):
                raise ConfigurationError(
                    f"{source} has weights that are not finite, the first in {name}: {full_name}; training "
                    "diverged or the file is damaged; use another copy"
                )
