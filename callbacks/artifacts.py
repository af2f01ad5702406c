"""Give files of a run to the loggers that keep files."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger


def log_file(trainer: L.Trainer, path: Path, kind: str) -> None:
    """Give a file to each Weights & Biases and MLflow logger; other loggers keep no files.

    Args:
        trainer: The trainer; called on the first process.
        path: The file; nothing happens if there is none.
        kind: Its folder in MLflow, and its type in Weights & Biases.
    """
    if not path.is_file():
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run: Any = logger.experiment
            run.log_artifact(str(path), name=f"{run.id}-{kind}", type=kind)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), artifact_path=kind)
