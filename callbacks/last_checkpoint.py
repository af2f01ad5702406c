"""The checkpoint that a run is resumed from."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_draft.distributed import uses_deepspeed, uses_fsdp
from lightning_draft.errors import ConfigurationError


class LastCheckpoint(Checkpoint):
    """Keep one checkpoint, `last.ckpt`: every `every_n_steps` steps, when training ends, and when it is interrupted.

    It holds what is trained, the optimiser and the positions in the data; `--ckpt_path last` resumes from it. What is
    saved of an interrupted step is the end of the step before, so that a resumed run equals the uninterrupted one. For
    checkpoints by score add Lightning's `ModelCheckpoint` to `trainer.callbacks`.

    Args:
        every_n_steps: Optimisation steps between writes.
        dirpath: Where to write; by default `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 100, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ConfigurationError(f"LastCheckpoint: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._path: Path | None = None
        self._saved = -1
        self._position: tuple[int, dict[str, Any]] | None = None
        self._interrupted = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder."""
        if stage == "fit":
            run = trainer.log_dir or trainer.default_root_dir
            self._path = (Path(self.dirpath) if self.dirpath else Path(run) / "checkpoints") / "last.ckpt"
            self._saved = -1
            self._position = None
            self._interrupted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was resumed is saved already."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save every `every_n_steps` optimisation steps, and note where the data and the counters stand after each."""
        if self._position is None or self._position[0] != trainer.global_step:
            self._position = (trainer.global_step, deepcopy(trainer.fit_loop.state_dict()))
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what training ended with."""
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what a training had reached that Ctrl-C or SIGTERM ends, or that fails in its only process.

        Where processes hold parts of what is saved, the others may be elsewhere: the last checkpoint stays.
        """
        together = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        apart = uses_fsdp(trainer) or uses_deepspeed(trainer)
        if self._saved >= 0 and (trainer.world_size == 1 or (together and not apart)):
            self._interrupted = True
            self.save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The batch of an interrupted step counts as not yet seen."""
        if self._interrupted and self._position is not None and self._position[0] == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = self._position[1]

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint, unless this step's is written."""
        if self._path is not None and trainer.global_step != self._saved:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self._path)
