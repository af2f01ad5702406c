"""Log files of a run as artifacts, and its model card, with the loggers that store them."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger


def log_files(trainer: L.Trainer, paths: Sequence[Path], kind: str) -> None:
    """Log files as artifacts with each Weights & Biases and MLflow logger; other loggers do not store files.

    Args:
        trainer: The trainer; call this function on process 0 only.
        paths: The files; those that do not exist are left out.
        kind: The folder of the files in MLflow; in Weights & Biases, they are one artifact of this type.
    """
    files = [path for path in paths if path.is_file()]
    for logger in trainer.loggers if files else []:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger.experiment, files, kind)
        elif isinstance(logger, MLFlowLogger):
            for path in files:
                logger.experiment.log_artifact(logger.run_id, str(path), artifact_path=kind)


def log_card(trainer: L.Trainer, card: str) -> None:
    """Show a model card, without its front matter and images, on the page "Text" of each TensorBoard logger."""
    body = card.split("---\n", 2)[-1]
    text = "\n".join(line for line in body.splitlines() if not line.startswith("!["))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("card", text, trainer.global_step)


def _log_to_wandb(run: Any, files: Sequence[Path], kind: str) -> None:
    wandb: Any = import_module("wandb")
    artifact = wandb.Artifact(f"{run.id}-{kind}", type=kind)
    for path in files:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
