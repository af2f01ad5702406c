"""Summaries that a run prints before and after training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_draft.assets import resolve
from lightning_draft.callbacks import LoRAExport, OverOptimizationGuard
from lightning_draft.callbacks.lora_header import describe
from lightning_draft.methods.base import RewardModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.single_file import diffusers_code


def headline(module: RewardModule) -> str:
    """Return one line with the method, reward, sampler and number of trainable parameters."""
    count = sum(parameter.numel() for parameter in module.trainable_parameters().values())
    strategies = module.strategies()
    names = ("reward", "method", "advantage_estimator", "sampler")
    described = ", ".join(describe(strategies[name]) for name in names if name in strategies)
    return f"{type(module).__name__}: {described}; {count:,} trainable parameters"


def folder_line(trainer: Trainer, folder: Path) -> str:
    """Return a line with the run's folder and the command that shows its curves."""
    hint = f"    (curves: tensorboard --logdir {folder.parent})"
    return f"run folder: {folder}{hint if any(isinstance(each, TensorBoardLogger) for each in trainer.loggers) else ''}"


def closing_lines(trainer: Trainer, module: RewardModule, folder: Path) -> Iterator[str]:
    """Yield the LoRA files or the pipeline folders, and how to use the first."""
    exported = exported_paths(trainer)
    if files := [path for path in exported if path.is_file()]:
        yield f"LoRA files: {'  '.join(map(str, files))}"
        if (comfy := files[0].with_suffix(".comfy.safetensors")).is_file():
            yield f"ComfyUI:    {comfy}"
        yield f"sample:     lightning-draft sample {folder}"
        yield from lora_lines(module.model, files[0])
    elif folders := [path.with_suffix("") for path in exported if path.with_suffix("").is_dir()]:
        yield f"pipelines:  {'  '.join(map(str, folders))}"
        yield "in diffusers:"
        yield f"    {loading_code(str(folders[0]), _pipeline_of(module.model)[1])}"


def lora_lines(model: DiffusionModel, file: Path) -> Iterator[str]:
    """Yield the Python code that loads a LoRA file: in diffusers, if the model's pipeline class can load LoRA files."""
    base, pipeline = _pipeline_of(model)
    if isinstance(model, PipelineModel) and not model.family.loads_lora:
        yield f"in Python ({pipeline} of diffusers loads no LoRA files):"
        yield f"    from {type(model).__module__} import {type(model).__name__}"
        yield f'    model = {type(model).__name__}("{base}", lora=None)'
        yield f'    model.load_lora("{file}")'
        return
    scheduled = isinstance(model, PipelineModel) and model.lora is not None and model.lora.scale_schedule is not None
    note = "  # its scale changes by step: see the code in README.md beside it" if scheduled else ""
    yield "in diffusers:"
    yield f"    {_opening_code(model)}"
    yield f'    pipe.load_lora_weights("{file}"){note}'


def loading_code(base: str, pipeline: str) -> str:
    """Return the line that opens a base model in diffusers: a single file, or a folder or hub id.

    Args:
        base: The model's `pretrained`.
        pipeline: Name of the pipeline's class.
    """
    place = str(resolve(base))
    method = "from_single_file" if Path(place).expanduser().is_file() else "from_pretrained"
    return f'pipe = {pipeline}.{method}("{place}")'


def _opening_code(model: DiffusionModel) -> str:
    base, pipeline = _pipeline_of(model)
    if isinstance(model, PipelineModel):
        code = diffusers_code(model.family, base, model.pretrained_config, model.omitted)
        if code is not None:
            return f"pipe = {code}"
    return loading_code(base, pipeline)


def _pipeline_of(model: DiffusionModel) -> tuple[str, str]:
    """Return a model's `pretrained` and the name of its pipeline class."""
    if not isinstance(model, PipelineModel):
        return "...", "DiffusionPipeline"
    return str(model.pretrained), model.family.pipeline_name


def exported_paths(trainer: Trainer) -> list[Path]:
    """Return the exported paths of a run, the recommended first: the guard's, the best by validation, the last."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [callback.best_path for callback in callbacks if isinstance(callback, OverOptimizationGuard)]
    written = exports(trainer)
    return [*paths, *(export.best_path for export in written), *(export.last_path for export in written)]


def exports(trainer: Trainer) -> list[LoRAExport]:
    """Return the callbacks of a run that export LoRA files."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LoRAExport)]
