"""The assumptions of `callbacks/position.py` about Lightning's loops, compared with the Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_draft.callbacks.position import hold_validation, next_epoch, raise_limits, set_limits, validation_is_due

CHANGED = "Lightning has changed its training loop: adapt callbacks/position.py"


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unsized(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(6, 1))

    def __repr__(self) -> str:  # part of test names, which are equal in all processes
        return "Unsized()"


class Compare(Callback):
    """Records after each batch the prediction, and whether a validation followed."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.predicted: list[bool] = []
        self.happened: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = self.stop_at is not None and trainer.global_step >= self.stop_at
        self.predicted.append(validation_is_due(trainer))
        self.happened.append(False)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.happened[-1] = True


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    defaults = {"accelerator": "cpu", "max_epochs": 3, "num_sanity_val_steps": 0, "default_root_dir": folder}
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


def fit(trainer: L.Trainer, data: Any = None) -> None:
    loader = torch.utils.data.DataLoader(torch.ones(6, 1) if data is None else data)
    trainer.fit(Module(), loader, torch.utils.data.DataLoader(torch.ones(2, 1)))


@pytest.mark.parametrize(
    ("options", "data", "stop_at"),
    [
        ({}, None, None),
        ({"limit_val_batches": 0}, None, None),
        ({"val_check_interval": 2}, None, None),
        ({"val_check_interval": 0.5, "accumulate_grad_batches": 2}, None, None),
        ({"check_val_every_n_epoch": 2}, None, None),
        ({"check_val_every_n_epoch": None, "val_check_interval": 4}, None, None),
        ({"limit_train_batches": 4, "val_check_interval": 4}, None, None),
        ({}, None, 3),
        ({"min_steps": 5}, None, 3),
        ({"min_epochs": 2}, None, 3),
        ({}, Unsized(), None),
        ({"val_check_interval": 4}, Unsized(), None),
        ({"limit_train_batches": 4}, Unsized(), None),
    ],
    ids=str,
)
def test_validation_is_due_exactly_when_the_trainer_validates(
    options: dict[str, Any], data: Any, stop_at: int | None, tmp_path: Path
) -> None:
    compare = Compare(stop_at)
    fit(trainer_of(tmp_path, compare, **options), data)
    assert compare.predicted == compare.happened, CHANGED
    assert any(compare.happened) == ("limit_val_batches" not in options)


def test_time_based_validation_can_be_due_after_every_batch(tmp_path: Path) -> None:
    compare = Compare()
    fit(trainer_of(tmp_path, compare, val_check_interval="00:01:00:00", max_steps=2, check_val_every_n_epoch=None))
    assert compare.predicted == [True, True]


class Positions(Callback):
    def __init__(self) -> None:
        self.ends: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.starts.append(trainer.fit_loop.epoch_progress.state_dict())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ends.append(trainer.fit_loop.state_dict())


def test_the_position_after_the_last_batch_of_an_epoch_becomes_the_start_of_the_next(tmp_path: Path) -> None:
    positions = Positions()
    fit(trainer_of(tmp_path, positions, max_epochs=2))
    for batch, end in enumerate(positions.ends[:-1]):
        moved = next_epoch(end)
        assert moved["epoch_progress"] == positions.starts[batch + 1], CHANGED
        assert moved["epoch_loop.batch_progress"]["is_last_batch"] is False, CHANGED
        assert (moved is end) == (batch != 5), CHANGED


class SetLimits(Callback):
    def __init__(self, max_steps: int, max_epochs: int | None) -> None:
        self.limits = max_steps, max_epochs

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        set_limits(trainer, *self.limits)


@pytest.mark.parametrize(("limits", "steps"), [((4, -1), 4), ((-1, 2), 12), ((8, 5), 8)])
def test_set_limits_end_training(limits: tuple[int, int | None], steps: int, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, SetLimits(*limits), max_epochs=1)
    fit(trainer)
    assert trainer.global_step == steps, CHANGED
    assert (trainer.max_steps, trainer.max_epochs) == limits, CHANGED


@pytest.mark.parametrize(
    ("limits", "raised"), [((4, 2), (5, 3)), ((-1, 2), (-1, 3)), ((4, -1), (5, -1)), ((4, None), (5, None))]
)
def test_raising_limits_keeps_unlimited_ones(limits: Any, raised: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=limits[0], max_epochs=limits[1])
    raise_limits(trainer)
    assert (trainer.max_steps, trainer.max_epochs) == raised, CHANGED


class Held(Callback):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        hold_validation(trainer, 7)
        assert trainer.training, CHANGED

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.epochs.append(trainer.current_epoch)


def test_held_validation_has_the_epoch_that_it_belongs_to(tmp_path: Path) -> None:
    held = Held()
    fit(trainer_of(tmp_path, held, max_epochs=1))
    assert held.epochs == [7, 0], CHANGED
