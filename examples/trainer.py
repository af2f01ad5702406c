"""The Trainer of the experiments."""

from typing import Any

import lightning as L


def without_files(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a Trainer on one device that writes no files and prints no progress, for any number of epochs."""
    defaults = {"max_epochs": -1, "gradient_clip_val": 1.0, "limit_val_batches": 0, "accelerator": "auto", "devices": 1}
    return L.Trainer(
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **{**defaults, **options},
    )
