"""Write the trained parameters of a module to files, and copy those of a resumed run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import lightning as L
from torch import Tensor

from lightning_draft.distributed import uses_fsdp
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_folder, atomic_path
from lightning_draft.methods.base import RewardModule
from lightning_draft.models.pipeline import PipelineModel


@runtime_checkable
class SavesLoRA(Protocol):
    """A model that can write its adapters to a file."""

    def save_lora(
        self, path: Path, metadata: Mapping[str, str] | None = None, values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the adapters, or `values` instead of them, with metadata for the file's header."""


def write(
    trainer: L.Trainer,
    module: RewardModule,
    path: Path,
    metadata: dict[str, str],
    values: dict[str, Tensor],
    comfy: bool = False,
) -> None:
    """Write the model's adapters to a file, or its pipeline to a folder if the denoiser's own weights are trained.

    Args:
        trainer: The trainer.
        module: Its module.
        path: The file.
        metadata: Text for its header.
        values: Result of `gather_full`; used if this process stores only a shard of the adapters.
        comfy: Also write the file for ComfyUI, `NAME.comfy.safetensors`, if the names of the layers are known.

    Raises:
        ConfigurationError: The file cannot be written, for example because the disk is full.
    """
    own = {name.removeprefix("model."): value for name, value in values.items()} if uses_fsdp(trainer) else None
    if isinstance(module.model, PipelineModel) and module.model.trainable != "lora":
        module.model.save_pipeline(path.with_suffix(""), metadata, own)
        return
    model = cast(SavesLoRA, module.model)
    with atomic_path(path) as partial:
        if own is None:
            model.save_lora(partial, metadata)
        else:
            model.save_lora(partial, metadata, own)
    if comfy and isinstance(module.model, PipelineModel) and module.model.has_comfy_names:
        title = {"title": path.parent.parent.name or path.stem}
        module.model.save_lora(path.with_suffix(f".comfy{path.suffix}"), {**metadata, **title}, own, "comfy")


def copy_from_resumed_run(trainer: L.Trainer, folder: Path | None, path: Path) -> None:
    """Copy a file of the resumed run, or its pipeline folder, into the folder of this run, if the folders differ.

    Args:
        trainer: The trainer.
        folder: The folder of the resumed run, if any.
        path: The file in this run's folder.
    """
    if not trainer.is_global_zero or folder is None or folder.resolve() == path.parent.resolve():
        return
    file, pipeline = folder / path.name, folder / path.stem
    if file.is_file():
        with atomic_path(path) as partial:
            shutil.copyfile(file, partial)
    if pipeline.is_dir():
        with atomic_folder(path.with_suffix("")) as partial:
            shutil.copytree(pipeline, partial, dirs_exist_ok=True)


def check_exportable(module: RewardModule, callback: object) -> None:
    """Check that the adapters can be written to a file.

    Raises:
        ConfigurationError: The model has no method `save_lora`.
    """
    if not isinstance(module.model, SavesLoRA):
        raise ConfigurationError(
            f"{type(module.model).__name__} has no save_lora(path, metadata), so {type(callback).__name__} cannot "
            "write its adapters; add the method to the model, or leave the callback out"
        )
