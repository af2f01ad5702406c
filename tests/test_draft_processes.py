"""DRaFT in two processes: shared random choices and parameters, own noise."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_draft.methods.draft import DraftModule
from lightning_draft.seeds import derive_seed
from lightning_draft.truncation import LastK, RandomSteps
from tests.tiny_draft import linear, make, trainer_of
from tests.tiny_runs import data, values


class Note(Callback):
    """Records the random choices and the final parameters of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        model, self.noise, self.calls = pl_module.model, [], []
        sample_noise = model.noise

        def recorded_noise(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
            self.noise.append(sample_noise(batch_size, generator))
            return self.noise[-1]

        model.noise = recorded_noise

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.model.calls_with_gradient = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.calls.append(pl_module.model.calls_with_gradient)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        del pl_module.model.noise
        notes = {"noise": torch.cat(self.noise), "calls": self.calls, "theta": pl_module.model.theta.detach()}
        torch.save(notes, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_share_random_choices_and_parameters_but_not_noise(tmp_path: Path) -> None:
    """The update is that of the mean of their gradients."""

    def module() -> DraftModule:
        return linear(
            truncation=RandomSteps(),
            checkpointing="none",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )

    options = {"strategy": "ddp_fork", "devices": 2, "limit_val_batches": None}
    trainer_of(tmp_path, Note(tmp_path), max_steps=4, **options).fit(module(), data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["calls"] == two["calls"]
    assert len(set(one["calls"])) > 1
    assert torch.equal(one["theta"], two["theta"])
    assert not torch.isclose(one["noise"], two["noise"]).any()

    trainer_of(tmp_path, Note(tmp_path), max_steps=1, **options).fit(module(), data())
    slopes = []
    for notes in (one, two):
        alone = module()
        chain = alone.chain(["a"] * 2, torch.Generator().manual_seed(derive_seed(0, 0)))
        latents = alone.truncation(chain, notes["noise"][:2])
        slopes.append(torch.autograd.grad(-latents.mean((1, 2, 3)).mean(), alone.model.theta)[0])
    after = torch.load(tmp_path / "0.pt")["theta"]
    assert after.item() == pytest.approx((0.1 - 0.1 * torch.stack(slopes).mean()).item(), rel=1e-6)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(values(pl_module), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_have_equal_parameters_after_training_a_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    """With recomputed steps and micro-batches."""
    module = make(tiny_sd, truncation=LastK(2), micro_batch_size=1)
    before = values(module)
    options = {"strategy": "ddp_fork", "devices": 2}
    trainer_of(tmp_path, Save(tmp_path), max_steps=2, **options).fit(module, data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(two[name], value), name
        assert torch.equal(before[name], value) != ("lora_" in name), name
