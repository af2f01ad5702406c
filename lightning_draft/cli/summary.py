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
from lightning_draft.models.pipeline import PipelineModel


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
    base, pipeline, note = "...", "DiffusionPipeline", ""
    if isinstance(module.model, PipelineModel):
        if module.model.lora is not None and module.model.lora.scale_schedule is not None:
            note = "  # its scale changes by step: see the code in README.md beside it"
        base, pipeline = str(module.model.pretrained), module.model.family.pipeline_name
    exported = exported_paths(trainer)
    if files := [path for path in exported if path.is_file()]:
        yield f"LoRA files: {'  '.join(map(str, files))}"
        yield f"sample:     lightning-draft sample {folder}"
        yield "in diffusers:"
        yield f"    {loading_code(base, pipeline)}"
        yield f'    pipe.load_lora_weights("{files[0]}"){note}'
    elif folders := [path.with_suffix("") for path in exported if path.with_suffix("").is_dir()]:
        yield f"pipelines:  {'  '.join(map(str, folders))}"
        yield "in diffusers:"
        yield f"    {loading_code(str(folders[0]), pipeline)}"


def loading_code(base: str, pipeline: str) -> str:
    """Return the line that opens a base model in diffusers: a single file, or a folder or hub id.

    Args:
        base: The model's `pretrained`.
        pipeline: Name of the pipeline's class.
    """
    place = str(resolve(base))
    method = "from_single_file" if Path(place).expanduser().is_file() else "from_pretrained"
    return f'pipe = {pipeline}.{method}("{place}")'


def exported_paths(trainer: Trainer) -> list[Path]:
    """Return the exported paths of a run, the recommended first: the guard's, the best by validation, the last."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    exports = [callback for callback in callbacks if isinstance(callback, LoRAExport)]
    paths = [callback.best_path for callback in callbacks if isinstance(callback, OverOptimizationGuard)]
    return [*paths, *(export.best_path for export in exports), *(export.last_path for export in exports)]
