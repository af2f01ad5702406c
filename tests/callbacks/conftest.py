"""Short runs with a linear model, a linear reward, and a logger that records its calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import Full, LastK

PROMPTS = [f"prompt {i}" for i in range(8)]


class RecordingLogger(Logger):
    """Records every call of `log_metrics`."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return "0"

    @property
    def experiment(self) -> Any:
        """None, so images are not logged."""
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        """Return the calls that logged a metric with the prefix."""
        return [(step, metrics) for step, metrics in self.metrics if any(name.startswith(prefix) for name in metrics)]


@pytest.fixture
def logger() -> RecordingLogger:
    return RecordingLogger()


@pytest.fixture
def make_module() -> Callable[..., DraftModule]:
    def make(**options: Any) -> DraftModule:
        defaults = {
            "model": LinearModel(0.1),
            "reward": LinearReward(),
            "sampler": DDIM(4),
            "truncation": Full(),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        }
        return DraftModule(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


@pytest.fixture
def data() -> PromptDataModule:
    return PromptDataModule(PROMPTS, batch_size=2, val_size=2)


@pytest.fixture
def make_diffusion_module(tiny_sd: Path) -> Callable[..., DraftModule]:
    """A small Stable Diffusion pipeline with adapters and three DDIM steps, two of them trained."""

    def make(**options: Any) -> DraftModule:
        defaults = {
            "model": StableDiffusion(str(tiny_sd), lora=LoRA(rank=2, seed=0)),
            "reward": ColorTarget(1.0, 0.0, 0.0),
            "sampler": DDIM(3),
            "truncation": LastK(2),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        }
        return DraftModule(**{**defaults, **options})

    return make
