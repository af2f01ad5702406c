"""Costs against what the methods' arithmetic says they are."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_draft.advantages import LeaveOneOut
from lightning_draft.callbacks import CostMonitor
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.objectives import PRDP
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import LastK, LowVariance

PROMPTS = [f"prompt {i}" for i in range(6)]


def fit(folder: Path, module: Any, steps: int = 2, *callbacks: Callback, **options: Any) -> CostMonitor:
    monitor = CostMonitor()
    settings: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "val_check_interval": 1, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[monitor, *callbacks],
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{k: v for k, v in settings.items() if k != "ckpt_path"},
    )
    data = PromptDataModule(PROMPTS, batch_size=2, val_size=2)
    trainer.fit(module, data, ckpt_path=settings.get("ckpt_path"))
    for name, value in monitor.state_dict().items():
        assert float(trainer.callback_metrics[f"cost/{name}"]) == pytest.approx(value)
    return monitor


def draft(**options: Any) -> DraftModule:
    model = options.pop("model", None) or LinearModel(0.1)
    return DraftModule(model, LinearReward(), DDIM(5), **options)


@pytest.mark.parametrize(
    ("options", "queries", "forwards", "backwards"),
    [
        ({"truncation": LastK(2), "checkpointing": "none"}, 1, 5, 2),
        ({"truncation": LastK(2), "checkpointing": "step"}, 1, 7, 2),
        ({"truncation": LastK(1), "micro_batch_size": 1}, 1, 6, 1),
        ({"truncation": LowVariance(2)}, 3, 7, 3),
        ({"truncation": LastK(2), "checkpointing": "none", "kl_weight": 0.1}, 1, 7, 2),
    ],
    ids=["DRaFT-2", "recomputed", "micro-batches", "DRaFT-LV", "DRaFT+"],
)
def test_direct_methods(tmp_path: Path, options: Any, queries: int, forwards: int, backwards: int) -> None:
    """A sample and step; validation and the proof before training are left out."""
    monitor = fit(tmp_path, draft(**options))
    assert monitor.reward_queries == 2 * 2 * queries
    assert monitor.network_forwards == 2 * 2 * forwards
    assert monitor.network_backwards == 2 * 2 * backwards
    assert monitor.seconds > 0


@pytest.mark.parametrize(
    ("options", "forwards", "backwards"),
    [
        ({}, 5 + 2 * 4, 2 * 4),
        ({"kl_weight": 0.1}, 5 + 4 * 4, 2 * 4),
        ({"objective": PRDP()}, 5 + 4 + 4 + 2 * 4, 2 * 4),  # the reference; log-probabilities once the model has moved
    ],
    ids=["PPO", "KL", "PRDP"],
)
def test_policy_gradients(tmp_path: Path, options: Any, forwards: int, backwards: int) -> None:
    """Five steps, four of them stochastic, and two updates from a rollout of two prompts with three samples each."""
    module = PolicyGradientModule(
        LinearModel(0.1),
        LinearReward(),
        DDIM(5, eta=1.0),
        advantage_estimator=LeaveOneOut(),
        samples_per_prompt=3,
        inner_epochs=2,
        timesteps_per_minibatch=1,
        **options,
    )
    monitor = fit(tmp_path, module, accumulate_grad_batches=4)
    assert monitor.reward_queries == 6
    assert monitor.network_forwards == 6 * forwards
    assert monitor.network_backwards == 6 * backwards


def test_guidance_counts_twice(tiny_sd: Path, tmp_path: Path) -> None:
    def cost(scale: float) -> CostMonitor:
        model = StableDiffusion(str(tiny_sd), guidance=Guidance(scale), lora=LoRA(2))
        module = DraftModule(model, Brightness(), DDIM(2, spacing="trailing"), LastK(1))
        return fit(tmp_path, module, 1, limit_val_batches=0)

    one, two = cost(1.0), cost(3.0)
    assert (two.network_forwards, two.network_backwards) == (2 * one.network_forwards, 2 * one.network_backwards)
    assert one.network_forwards == 2 * 2


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    first = fit(tmp_path, draft(truncation=LastK(1)), 2, Save())
    whole = fit(tmp_path, draft(truncation=LastK(1)), 4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert whole.reward_queries == 2 * first.reward_queries
    assert whole.network_forwards == 2 * first.network_forwards
    assert whole.seconds > first.seconds
