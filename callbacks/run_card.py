"""Write the model card of an exported LoRA with the scores and images of the last validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L

from lightning_draft.callbacks.artifacts import log_card
from lightning_draft.callbacks.image_grid import comparison, to_pil_image
from lightning_draft.callbacks.lora_header import training_settings
from lightning_draft.files import atomic_path
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.validation_record import Change, ValidationRecord
from lightning_draft.model_card import GRID, WIDGET, Results, has_card, write_card


def validation_changes(trainer: L.Trainer, module: RewardModule) -> dict[str, Change]:
    """Return the changes of the scores in the last validation, over the images of all processes.

    All processes must call it.
    """
    if module.validation is None:
        return {}
    if trainer.world_size == 1:
        return module.validation.changes()
    return module.validation.changes(lambda sums: trainer.strategy.reduce(sums.to(module.device), reduce_op="sum"))


def write_run_card(
    trainer: L.Trainer,
    module: RewardModule,
    path: Path,
    metadata: Mapping[str, str],
    comfy: bool,
    changes: Mapping[str, Change],
    log: bool = True,
) -> None:
    """Write the card of a LoRA file with its images, if models of this kind have cards, and show it in TensorBoard.

    Args:
        trainer: The trainer; call this function on process 0 only.
        module: Its module.
        path: The file.
        metadata: Its metadata.
        comfy: Whether files for ComfyUI are written if the family supports them.
        changes: Scores of the last validation; empty if it was not one of these adapters.
        log: Whether to show it in TensorBoard.
    """
    if not has_card(module.model):
        return
    record = module.validation if changes else None
    if record is not None:
        write_images(record, path.parent)
    results = Results(changes, [] if record is None else record.prompts, training_settings(trainer, module))
    card = write_card(module.model, path, metadata, comfy, results)
    if log:
        log_card(trainer, card)


def write_images(record: ValidationRecord, folder: Path) -> None:
    """Write the first images of a validation: those of the fine-tuned model, and a comparison with the base model."""
    tuned = [to_pil_image(image, min_size=1) for image in record.images["fine-tuned"]]
    files = {folder / WIDGET.format(number): image for number, image in enumerate(tuned)}
    files[folder / GRID] = comparison(record.prompts, record.images, per_row=2)
    for path, image in files.items():
        with atomic_path(path) as partial:
            image.save(partial, format="PNG")
