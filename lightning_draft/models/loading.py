"""Open diffusers' pipelines (shipped names, folders, single files, hub ids), and write fine-tuned ones."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_folder
from lightning_draft.models import skeleton
from lightning_draft.models.damage import check_complete, check_finite, describe_damage
from lightning_draft.models.families import class_for_layout, class_for_pipeline
from lightning_draft.models.family import Family
from lightning_draft.models.layouts import layout_of
from lightning_draft.models.quantization import Quantization, loading_quantized, quantization_config
from lightning_draft.models.single_file import open_single_file
from lightning_draft.text import first_line
from lightning_draft.weightless import is_without_weights

_SHIPPED = ("emoji64",)
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def load_pipeline(
    family: Family,
    pretrained: str,
    dtypes: Mapping[str, torch.dtype],
    config: str | None = None,
    omit: Sequence[str] = (),
    quantization: Quantization | None = None,
) -> Any:
    """Open a text-to-image pipeline of a family.

    Safetensors files are preferred; pickles are read with `weights_only=True`; code from a repository is never run.

    Args:
        family: The family.
        pretrained: A shipped name, a folder, a `.safetensors` file in the original layout, or a hub id.
        dtypes: Dtype of the weights of each network, by name.
        config: For a single file: the folder or hub id of a pipeline with the same architecture.
        omit: Components that are not loaded.
        quantization: How the denoiser and the text encoders are quantized.

    Raises:
        ConfigurationError: The pipeline cannot be found, is damaged, or is of another kind.
    """
    path = _local(pretrained)
    loading = _Loading(family, dtypes, {**family.unused, **dict.fromkeys(omit)}, quantization)
    with _quiet(), loading_quantized(quantization):
        if path.is_file():
            _check_not_quantized(path, quantization)
            pipeline = open_single_file(family, path, dtypes, config, omit)
        elif path.is_dir():
            pipeline = loading.folder(path)
        elif _is_path(pretrained):
            raise ConfigurationError(
                f"{pretrained} does not exist; give a pipeline folder, a .safetensors file, a hub id such as "
                f"{family.example}, or the shipped name {' or '.join(_SHIPPED)}"
            )
        else:
            pipeline = loading.hub(pretrained)
    if not is_without_weights():
        check_finite(pipeline, family, pretrained)
    return pipeline


def save_pipeline(
    pipeline: Any, folder: Path, family: Family, trained: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a pipeline with new weights in its denoiser; an older pipeline is replaced when the new one is complete.

    Args:
        pipeline: From `load_pipeline`; its denoiser is changed.
        folder: Folder to write.
        family: The family of the pipeline.
        trained: Weights of the denoiser, by name.
        metadata: Text for `training.json`.

    Raises:
        ConfigurationError: The folder has other content than a pipeline.
    """
    check_replaceable(folder)
    own = dict(getattr(pipeline, family.denoiser).named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            own[name].copy_(value)
    with atomic_folder(folder) as partial, _quiet():
        pipeline.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(dict(metadata), indent=2) + "\n")


def check_replaceable(folder: Path) -> None:
    """Check that a path does not exist, or is a folder that is empty or contains a pipeline.

    Raises:
        ConfigurationError: It has other content, which replacing it would delete.
    """
    if not folder.exists() or (folder / "model_index.json").is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ConfigurationError(
            f"{folder} exists and is not a pipeline, and its content would be lost; write the name of a new folder"
        )


def opener(pretrained: str) -> str | None:
    """Return the name of the model class that opens a pipeline; `None` if its family is not known.

    Args:
        pretrained: As for `load_pipeline`.
    """
    path = _local(pretrained)
    if path.is_file():
        return class_for_layout(layout_of(path))
    if not path.is_dir() and _is_path(pretrained):
        return None
    try:
        name = DiffusionPipeline.load_config(str(path) if path.is_dir() else pretrained).get("_class_name")
    except OSError:
        return None
    return class_for_pipeline(str(name))


def public_name(pretrained: str) -> str:
    """Return the name of a pipeline without local folders, for files that are shared.

    A shipped name or a hub id does not change; of a snapshot in the hub's cache the hub id is returned, and of another
    folder or file its own name.
    """
    path = Path(pretrained).expanduser()
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/", 1)
    return path.resolve().name if is_local(pretrained) or path.exists() else pretrained


def is_local(pretrained: str) -> bool:
    """Return whether a pipeline's name is that of a local folder or file, and not a shipped name or a hub id."""
    return pretrained not in _SHIPPED and _is_path(pretrained)


def _local(pretrained: str) -> Path:
    if pretrained not in _SHIPPED:
        return Path(pretrained).expanduser()
    from lightning_draft.assets import resolve

    return Path(resolve(pretrained))


def _check_not_quantized(file: Path, quantization: Quantization | None) -> None:
    if quantization is not None:
        raise ConfigurationError(
            f"quantization={quantization!r} needs a pipeline folder or a hub id, and {file} is a single file; convert "
            "it with diffusers' save_pretrained, or leave quantization out"
        )


@dataclass(frozen=True)
class _Loading:
    """How a pipeline's components are loaded.

    Args:
        family: The family.
        dtypes: Dtype of the weights of each network, by name.
        options: Components that are not loaded, and other arguments of `from_pretrained`.
        quantization: How the denoiser and the text encoders are quantized.
    """

    family: Family
    dtypes: Mapping[str, torch.dtype]
    options: Mapping[str, Any]
    quantization: Quantization | None

    def folder(self, folder: Path) -> Any:
        """Open the pipeline in a folder."""
        if not (folder / "model_index.json").is_file():
            raise ConfigurationError(
                f"{folder} is not a diffusers pipeline: it has no model_index.json; give the folder that "
                f"{self.family.pipeline_name}.save_pretrained wrote, not one of its components"
            )
        try:
            absent = _absent(self.family, str(folder))
            pipeline = self._open(str(folder), _variant(folder / self.family.denoiser), absent)
            if not is_without_weights():
                check_complete(pipeline, self.family, folder)
            return pipeline
        except ConfigurationError:
            raise
        except _FAILURES as error:
            raise ConfigurationError(
                f"{folder} cannot be opened as a pipeline: {describe_damage(folder) or first_line(error)}; copy or "
                "download it again"
            ) from error

    def hub(self, name: str) -> Any:
        """Open the pipeline of a hub id."""
        try:
            absent = _absent(self.family, name)
            try:
                return self._open(name, None, absent)
            except OSError:
                return self._open(name, "fp16", absent)
        except OSError as error:
            raise ConfigurationError(
                f"{name!r} is neither a local folder nor the shipped {' or '.join(_SHIPPED)}, and could not be "
                f"downloaded from the hub ({first_line(error)}); check the spelling and the connection, log in with "
                "`hf auth login` if it is private, or give a local folder"
            ) from error

    def _open(self, source: str, variant: str | None, absent: Mapping[str, None]) -> Any:
        options: dict[str, Any] = {**absent, **self.options}
        present = {name: dtype for name, dtype in self.dtypes.items() if name not in options}
        if is_without_weights():
            networks = skeleton.networks(self.family, source, present, self.quantization)
            return self.family.pipeline_class.from_pretrained(source, **networks, **options)
        if self.quantization is not None:
            dtype = self.dtypes[self.family.denoiser]
            options["quantization_config"] = quantization_config(self.quantization, self.family, list(present), dtype)
        return self.family.pipeline_class.from_pretrained(source, dtype=dict(self.dtypes), variant=variant, **options)


def _variant(denoiser: Path) -> str | None:
    """Return the infix of the weight files in the folder, such as `fp16`, if all have it."""
    names = [file.name for file in sorted(denoiser.glob("diffusion_pytorch_model*")) if not file.name.endswith(".json")]
    infixes = [name.split(".")[1].split("-")[0] if name.count(".") > 1 else None for name in names]
    return None if None in infixes else next(iter(infixes), None)


def _absent(family: Family, source: str) -> dict[str, None]:
    """Return `None` for each component that a saved pipeline lacks; diffusers needs these as arguments.

    Raises:
        ConfigurationError: The pipeline is of another family.
    """
    index = family.pipeline_class.load_config(source)
    name = index.get("_class_name")
    other = class_for_pipeline(str(name))
    if name == family.pipeline_name or (other and other == class_for_pipeline(family.pipeline_name)):
        return {part: None for part, kind in index.items() if kind == [None, None]}
    if name is None:
        raise ConfigurationError(f"{source}: model_index.json has no _class_name; copy or download the pipeline again")
    if not isinstance(name, str):
        raise ConfigurationError(
            f"{source} needs a pipeline class from its own repository, whose code is not run; use a pipeline of "
            f"diffusers, for example {family.example}"
        )
    advice = f"open it with {other}" if other else f"use such a pipeline, for example {family.example}"
    raise ConfigurationError(f"{source} is a {name} and not a {family.pipeline_name} ({family.title}); {advice}")


def _is_path(name: str) -> bool:
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(("/", ".safetensors", ".ckpt"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' progress bars while small files are read."""
    modules = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in modules:
            module.enable_progress_bar()
