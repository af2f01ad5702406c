"""Write checkpoints atomically, under any strategy."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_draft.distributed import uses_deepspeed
from lightning_draft.files import remove, write_stream, writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write local checkpoints to a temporary path and replace the target when they are complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; use Lightning's own writer for paths with a protocol, such as `s3://`."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_stream(partial(torch.save, checkpoint), path)


def write_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Write a checkpoint: a file, or a folder under DeepSpeed. All processes must call it together.

    Raises:
        ConfigurationError: The disk is full, or the folder cannot be written to.
    """
    if not uses_deepspeed(trainer):
        trainer.save_checkpoint(path)
        return
    new = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with writing(path):
        trainer.save_checkpoint(new)
        new = Path(trainer.strategy.broadcast(new))
        if trainer.is_global_zero:
            if path.exists():
                path.rename(_previous(path))
            new.rename(path)
            remove(_previous(path))
    trainer.strategy.barrier("LastCheckpoint")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def recover_checkpoint(path: Path) -> None:
    """Restore the previous folder if the process was killed between two renames, or remove it."""
    previous = _previous(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    remove(previous)
