"""DRaFT modules of a linear model and of a small pipeline, and their trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import Full, LastK
from tests.tiny_runs import PROMPTS

TARGETS = ["to_v", "conv_out"]


def make(folder: Path, *, model: dict[str, Any] | None = None, **options: Any) -> DraftModule:
    """DRaFT-1 towards red for a pipeline with reproducible, large initial adapters."""
    settings = {"guidance": Guidance(1.0), "lora": LoRA(4, alpha=8.0, target_modules=TARGETS, seed=0), **(model or {})}
    defaults: dict[str, Any] = {
        "model": StableDiffusion(str(folder), **settings),
        "reward": ColorBalance(),
        "sampler": DDIM(2, spacing="trailing"),
        "truncation": LastK(1),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return DraftModule(**{**defaults, **options})


def linear(**options: Any) -> DraftModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": LinearReward(),
        "sampler": DDIM(4),
        "truncation": Full(),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return DraftModule(**{**defaults, **options})


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def gradients(module: DraftModule, prompts: Sequence[str] = PROMPTS[:4], seed: int = 0) -> dict[str, Tensor]:
    """Return the gradients of the loss for one random choice."""
    torch.manual_seed(seed)
    loss, _ = module.loss_and_logs(prompts, torch.Generator().manual_seed(seed))
    parameters = module.trainable_parameters()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def stir(module: DraftModule) -> DraftModule:
    """Set the adapters to random values, so that both factors have a gradient."""
    generator = torch.Generator().manual_seed(3)
    for value in module.trainable_parameters().values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator).to(value)
    return module


class Recorder(Callback):
    """Records the logged values of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.steps.append(logged)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]
