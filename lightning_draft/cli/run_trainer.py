"""The Trainer of a run: one folder for everything, and loggers that write inside it."""

import inspect
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_draft.cli.run_folder import ROOT

_DEFAULT_DIRS = ("", ".", "./mlruns", "mlruns")


class RunTrainer(Trainer):
    """Lightning's Trainer, whose `log_dir` is the run's folder regardless of the loggers."""

    @property
    def log_dir(self) -> str:
        """Return the run's folder, which process 0 chooses; all processes must call this together."""
        return str(self.strategy.broadcast(self.default_root_dir))


def _read_integers_as_counts() -> None:
    """Let the parser try `int` before `float` for options such as `limit_val_batches`: 1 is one batch, 1.0 is all.

    Lightning declares them in this order, but `typing` caches optional unions regardless of order and may return one
    that was declared in the other order elsewhere.
    """
    annotations = Trainer.__init__.__annotations__
    annotations.update(
        {
            name: int | float | None
            for name, kind in annotations.items()
            if set(get_args(kind)) == {int, float, NoneType}
        }
    )


def _make_save_dir_optional() -> None:
    """Let `save_dir` of all loggers be the folder of all runs, in place of which `place_loggers` sets the run's."""
    for kind in (CSVLogger, TensorBoardLogger):
        constructor: Any = kind.__init__
        if inspect.signature(kind).parameters["save_dir"].default is inspect.Parameter.empty:
            constructor.__defaults__ = (ROOT, *(constructor.__defaults__ or ()))


_read_integers_as_counts()
_make_save_dir_optional()


class StepNumber(Callback):
    """Log all values at the number of completed optimization steps, as in progress lines and images."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Set the step number of the values of this step, from 1."""
        pl_module.log("step", float(trainer.global_step))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the step number of this validation to the number of steps before it."""
        if trainer.state.fn == "fit":
            pl_module.log("step", float(trainer.global_step))


def place_loggers(loggers: Any, folder: Path, root: Path) -> None:
    """Let configured loggers write to the run's folder, unless the user has set their `save_dir`.

    Args:
        loggers: The configuration `trainer.logger`, changed in place.
        folder: The run's folder.
        root: The folder of all runs, which as a logger's `save_dir` means the run's folder.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments is None or "save_dir" not in arguments or not _is_default(arguments["save_dir"], root):
            continue
        kind = str(logger["class_path"]).rpartition(".")[2]
        if kind == "TensorBoardLogger":
            arguments["save_dir"], arguments["name"], arguments["version"] = str(folder.parent), folder.name, ""
        elif kind == "MLFlowLogger":
            _place_mlflow(arguments, folder.absolute())
        else:
            arguments["save_dir"] = str(folder)
        if kind == "CSVLogger" and arguments["name"] == "lightning_logs":
            arguments["name"] = "csv"


def _place_mlflow(arguments: Any, folder: Path) -> None:
    """Store MLflow's database and files in the run's folder, unless a server or another store is given."""
    arguments["save_dir"] = str(folder / "mlruns")
    if not arguments["tracking_uri"]:
        arguments["tracking_uri"] = f"sqlite:///{folder}/mlflow.db"
        arguments["artifact_location"] = arguments["artifact_location"] or str(folder / "mlruns")


def _is_default(save_dir: Any, root: Path) -> bool:
    return save_dir is None or str(save_dir) in _DEFAULT_DIRS or Path(str(save_dir)) == root
