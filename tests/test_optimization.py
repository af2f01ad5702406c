"""Optimizers, learning-rate schedules and gradients that are not finite."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import DDIM
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import LinearModel, LinearReward


class Scripted(Reward):
    """The mean of the images times a factor for each call with gradient."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = [1.0, 1.0, *factors]  # two calls check the first step

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        factor = self.factors.pop(0) if images.requires_grad and self.factors else 1.0
        return factor * images.mean((1, 2, 3))


def module(**options: Any) -> DraftModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": LinearReward(),
        "sampler": DDIM(3),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    return DraftModule(**{**defaults, **options})


def fit(module: DraftModule, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, PromptDataModule(["a", "b", "c", "d"], batch_size=1, val_size=1))
    return trainer


class Thetas(L.Callback):
    """The parameter after each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.values.append(pl_module.model.theta.item())

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(self.values, Path(trainer.default_root_dir) / f"{trainer.global_rank}.pt")


# Gradients that are not finite.


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_changes_neither_parameters_nor_moments(factor: float, tmp_path: Path) -> None:
    thetas, subject = Thetas(), module(reward=Scripted([1.0, factor, 1.0, 1.0]))
    with pytest.warns(UserWarning, match=r"gradient is not finite at step 1, so the step changes nothing \(1 in a row"):
        trainer = fit(subject, tmp_path, thetas)
    assert thetas.values[1] == thetas.values[0]
    assert thetas.values[2] != thetas.values[1]
    assert math.isfinite(thetas.values[-1])
    assert subject.nonfinite_gradients.total == 1
    (state,) = trainer.optimizers[0].state.values()
    assert state["step"] == 3


def test_an_infinite_reward_with_a_finite_gradient_is_dropped_too(tmp_path: Path) -> None:
    class Shifted(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            infinite = prompts[0] == "infinite"
            return super().forward(images, prompts) + (math.inf if infinite else 0.0)

    subject = module(reward=Shifted())
    subject.model.theta.grad = None
    for prompt, finite in (("finite", True), ("infinite", False)):
        loss, _ = subject.loss_and_logs([prompt])
        (slope,) = torch.autograd.grad(loss, subject.model.theta)
        assert bool(slope.isfinite()) == finite


def test_repeated_non_finite_gradients_are_an_error_and_keep_the_parameters(tmp_path: Path) -> None:
    thetas, subject = Thetas(), module(reward=Scripted([1.0] + [math.nan] * 20))
    with pytest.raises(DivergenceError, match=r"not finite in 10 optimizer steps in a row, up to step 10, .*lower the"):
        fit(subject, tmp_path, thetas, max_steps=30)
    assert len(thetas.values) == 10
    assert subject.model.theta.item() == thetas.values[0] != 0.1


def test_a_finite_gradient_resets_the_count(tmp_path: Path) -> None:
    subject = module(reward=Scripted([math.nan, 1.0] * 12))
    fit(subject, tmp_path, max_steps=24)
    assert subject.nonfinite_gradients.total == 12


class Partly(LinearReward):
    """NaN for a prompt of only one of two processes."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().forward(images, prompts) * (math.nan if prompts[0] == self.bad else 1.0)

    bad = ""


def test_all_processes_drop_a_gradient_that_is_non_finite_on_one(tmp_path: Path) -> None:
    reward = Partly()
    order = PromptDataModule(["a", "b", "c", "d"], batch_size=1, val_size=1)
    reward.bad = str(order.train_dataloader().batch(2))[2:-2]  # the second step of the first process
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 3}
    fit(module(reward=reward), tmp_path, Thetas(), **options)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == two
    assert all(map(math.isfinite, one))
    assert len(set(one)) < 3


# Schedules and learning rates.


def test_reduce_on_plateau_steps_after_each_validation(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, "val/reward", mode="min", factor=0.5, patience=0)

    subject = module(lr_scheduler=schedule)  # the reward rises, which is a plateau for mode=min
    trainer = fit(
        subject, tmp_path, max_steps=6, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None
    )
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**2)


def test_plateau_schedule_of_an_unlogged_metric_is_rejected(tmp_path: Path) -> None:
    subject = module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/rewards"))
    with pytest.raises(ConfigurationError, match="monitors 'val/rewards', which is not logged; write one of .*val/"):
        fit(subject, tmp_path, limit_val_batches=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, "val/reward")},
            "ReduceLROnPlateau steps after each validation, and this run has none",
        ),
        (
            {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
            "does not say which metric it monitors; use lightning.pytorch.cli.ReduceLROnPlateau",
        ),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}, "optimizer.lr=0.0 must be a positive"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=-1.0)}, "rejects its options: Invalid learn"),
        ({"optimizer": lambda parameters: torch.optim.LBFGS(list(parameters))}, "LBFGS evaluates the loss several"),
    ],
)
def test_unsupported_optimizers_and_schedules_are_rejected(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(module(**options), tmp_path)


def test_accumulating_zero_batches_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="trainer.accumulate_grad_batches=0 must be at least 1"):
        fit(module(), tmp_path, accumulate_grad_batches=0)


def test_learning_rate_finder_sets_the_learning_rate(tmp_path: Path) -> None:
    """Without early stopping at four times the smallest loss, which a negative loss would trigger at once."""
    subject, finder = module(), LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    trainer = fit(subject, tmp_path, finder, enable_checkpointing=True)
    assert subject.lr is not None
    assert trainer.optimizers[0].param_groups[0]["lr"] == subject.lr != 0.01
    assert subject.batches == 4  # those of the search are not counted


# Seeds.


@pytest.mark.parametrize("seed", [-1, 2**70, 2**63, 0.5, True, "0"])
def test_seeds_out_of_range_are_rejected(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"seed=.* must be an integer between 0 and 2\^63 - 1"):
        module(seed=seed)


def test_derived_seeds_differ_and_are_in_range() -> None:
    seeds = {derive_seed(seed, number, rank) for seed in (0, 1, 2**63 - 1) for number in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
