"""Log files of a run as artifacts, with the loggers that store files."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger


def log_file(trainer: L.Trainer, path: Path, kind: str) -> None:
    """Log a file as an artifact with each Weights & Biases and MLflow logger; other loggers do not store files.

    Args:
        trainer: The trainer; call this function on process 0 only.
        path: The file; nothing happens if there is none.
        kind: The artifact's folder in MLflow, and its type in Weights & Biases.
    """
    if not path.is_file():
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run: Any = logger.experiment
            run.log_artifact(str(path), name=f"{run.id}-{kind}", type=kind)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), artifact_path=kind)
