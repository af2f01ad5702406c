"""Policy-gradient modules of a linear model and of a small pipeline, and short runs of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_draft.advantages import LeaveOneOut
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards import ColorBalance
from lightning_draft.samplers import DDIM
from lightning_draft.schedules import VariancePreserving
from lightning_draft.testing import LinearModel, LinearReward
from tests.tiny_runs import data

MILD = VariancePreserving((0.9, 0.7, 0.4), final_alpha_cumprod=0.97, spacing="trailing")
"""Three steps, the last one noisy too, that leave latents of the size of images."""


class BlackBox(LinearReward):
    differentiable = False

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(super().forward(images, prompts).numpy())


def linear(**options: Any) -> PolicyGradientModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": BlackBox(),
        "sampler": DDIM(4, eta=1.0),
        "advantage_estimator": LeaveOneOut(),
        "samples_per_prompt": 2,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return PolicyGradientModule(**{**defaults, **options})


def make(folder: Path, *, model: dict[str, Any] | None = None, **options: Any) -> PolicyGradientModule:
    """A pipeline with reproducible initial adapters."""
    lora = LoRA(4, alpha=8.0, target_modules=["to_v", "conv_out"], seed=0)
    settings = {"guidance": Guidance(1.0), "lora": lora, **(model or {})}
    defaults = {"model": StableDiffusion(str(folder), **settings), "reward": ColorBalance()}
    return linear(**{**defaults, "sampler": DDIM(3, eta=1.0, spacing="trailing"), **options})


def stir(module: PolicyGradientModule) -> PolicyGradientModule:
    """Set the adapters to random values, so that the model differs from its base."""
    generator = torch.Generator().manual_seed(3)
    for value in module.trainable_parameters().values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator).to(value)
    return module


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


class Recorder(Callback):
    """Records the logged values and the gradient of every optimization step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.gradients: list[Tensor] = []
        self._last = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = pl_module.trainable_parameters().values()
        self.gradients.append(torch.cat([value.grad.flatten() for value in parameters]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.steps.append(logged)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def fit(folder: Path, module: PolicyGradientModule, steps: int = 1, batch_size: int = 2, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer_of(folder, recorder, max_steps=steps, **options).fit(module, data(batch_size))
    return recorder


class Cut(Callback):
    """Raises Ctrl-C before a backward pass."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_before_backward(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
