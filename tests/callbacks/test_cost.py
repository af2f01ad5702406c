"""Costs against passes that are counted without hooks, by wrapping the network's `forward` and its output."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_draft.advantages import LeaveOneOut
from lightning_draft.callbacks import CostMonitor, LastCheckpoint
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion, StableDiffusion3, TextEncoding
from lightning_draft.objectives import PPO, PRDP
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance

PROMPTS = [f"prompt {i}" for i in range(6)]


def fit(folder: Path, module: Any, steps: int = 2, *callbacks: Callback, **options: Any) -> CostMonitor:
    monitor = CostMonitor()
    settings: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "val_check_interval": 1, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, monitor],
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
        assert float(trainer.callback_metrics[f"usage/{name}"]) == pytest.approx(value)
    return monitor


def draft(**options: Any) -> DraftModule:
    model = options.pop("model", None) or LinearModel(0.1)
    return DraftModule(model, LinearReward(), DDIM(5), **options)


class InTraining(Callback):
    """Whether training is between the start of a batch and the end of its backward pass."""

    def __init__(self) -> None:
        self.now = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.now = True

    def on_after_backward(self, *_: Any) -> None:
        self.now = False


@contextmanager
def counted(network: Any, training: InTraining) -> Iterator[dict[str, int]]:
    """Count passes per sample with a wrapper around `forward`; an autograd function counts the backward passes.

    `blocks` is the largest number of calls of any residual block, including recomputed ones. (Blocks before the first
    adapter are not recomputed if the network's input has no gradient.)
    """
    counts = {"forwards": 0, "backwards": 0, "blocks": 0}
    forward, resnet_forward = network.forward, ResnetBlock2D.forward
    ran: Counter[Any] = Counter()

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: Tensor) -> Tensor:
            return output.view_as(output)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            counts["backwards"] += len(gradient) * training.now
            return gradient

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        counts["forwards"] += len(sample) * training.now
        output = forward(*args, **kwargs)
        return (Passing.apply(output[0]),) if isinstance(output, tuple) else Passing.apply(output)

    def resnet(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        ran[block] += len(x) * training.now
        counts["blocks"] = max(ran.values())
        return resnet_forward(block, x, *args, **kwargs)

    network.forward = wrapped
    ResnetBlock2D.forward = resnet  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        del network.forward
        ResnetBlock2D.forward = resnet_forward  # type: ignore[method-assign]


def pipeline(kind: str, folder: Path, **guidance: Any) -> Any:
    if kind == "sd3":
        return StableDiffusion3(str(folder), guidance=Guidance(**guidance), lora=LoRA(2), text=TextEncoding(16))
    return StableDiffusion(str(folder), guidance=Guidance(**guidance), lora=LoRA(2))


@pytest.mark.parametrize(
    ("kind", "guidance", "options"),
    [
        ("sd", {"scale": 1.0}, {"truncation": LastK(2), "checkpointing": "none"}),
        ("sd", {"scale": 3.0}, {"truncation": LastK(2), "checkpointing": "none"}),
        ("sd", {"scale": 3.0, "gradient": "conditional"}, {"truncation": LastK(2), "checkpointing": "none"}),
        ("sd", {"scale": 3.0, "gradient": "conditional"}, {"truncation": Full(), "checkpointing": "step"}),
        ("sd", {"scale": 3.0}, {"truncation": LowVariance(2), "micro_batch_size": 1, "kl_weight": 0.1}),
        ("sd", {"scale": 1.0}, {"truncation": Full(), "checkpointing": "block"}),
        ("sd", {"scale": 3.0}, {"truncation": DRTune(2, 2), "checkpointing": "block"}),
        ("sd", {"scale": 1.0}, {"truncation": LastK(2), "checkpointing": "both"}),
        ("sd3", {"scale": 3.0, "gradient": "conditional"}, {"truncation": LastK(2), "checkpointing": "step"}),
    ],
    ids=["plain", "guidance", "conditional", "steps", "micro-batches", "blocks", "guided blocks", "both", "sd3"],
)
def test_passes_equal_independently_counted_ones(
    tiny_sd: Path, tiny_sd3: Path, tmp_path: Path, kind: str, guidance: Any, options: Any
) -> None:
    model, training = pipeline(kind, tiny_sd3 if kind == "sd3" else tiny_sd, **guidance), InTraining()
    sampler = FlowEuler(3) if kind == "sd3" else DDIM(3, spacing="trailing")
    module = DraftModule(model, Brightness(), sampler, **options)
    with counted(model.denoiser, training) as counts:
        monitor = fit(tmp_path, module, 1, training, limit_val_batches=0)
    assert monitor.network_backwards == counts["backwards"] > 0
    blocks = options.get("checkpointing") in ("block", "both")
    assert monitor.network_forwards == counts["blocks" if blocks else "forwards"]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_policy_passes_equal_independently_counted_ones(tiny_sd: Path, tmp_path: Path, checkpointing: Any) -> None:
    model, training = pipeline("sd", tiny_sd, scale=3.0, gradient="conditional"), InTraining()
    module = PolicyGradientModule(
        model,
        Brightness(),
        DDIM(3, eta=1.0),
        PPO(),
        samples_per_prompt=2,
        kl_weight=0.1,
        micro_batch_size=2,
        checkpointing=checkpointing,
    )
    with counted(model.denoiser, training) as counts:
        monitor = fit(tmp_path, module, 1, training, limit_val_batches=0, accumulate_grad_batches=2)
    assert monitor.network_forwards == counts["blocks" if checkpointing == "block" else "forwards"]
    assert monitor.network_backwards == counts["backwards"] > 0


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
def test_counts_of_direct_methods_equal_the_closed_form(
    tmp_path: Path, options: Any, queries: int, forwards: int, backwards: int
) -> None:
    """Counts per sample and step, without validation and the checks before training."""
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
def test_counts_of_policy_gradients_equal_the_closed_form(
    tmp_path: Path, options: Any, forwards: int, backwards: int
) -> None:
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


def test_counts_are_multiplied_by_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fit(tmp_path, draft(truncation=LastK(1)), 1)
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda trainer: 2))
    two = fit(tmp_path, draft(truncation=LastK(1)), 1, use_distributed_sampler=False)
    for name in ("reward_queries", "network_forwards", "network_backwards"):
        assert getattr(two, name) == 2 * getattr(one, name) > 0


def test_passes_of_other_callbacks_are_not_counted(tmp_path: Path) -> None:
    """At any position in the list of callbacks."""

    class Samples(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            pl_module.generate(["a"])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.generate(["a"])

    monitor = fit(tmp_path, draft(truncation=LastK(1)), 1, Samples())
    assert (monitor.network_forwards, monitor.network_backwards) == (2 * 5, 2)


def test_resumed_run_continues_counting(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    first = fit(tmp_path, draft(truncation=LastK(1)), 2, Save())
    whole = fit(tmp_path, draft(truncation=LastK(1)), 4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert whole.reward_queries == 2 * first.reward_queries
    assert whole.network_forwards == 2 * first.network_forwards
    assert whole.seconds > first.seconds


@pytest.mark.parametrize("moment", ["between batches", "within a batch"])
def test_interrupted_optimizer_step_is_counted_once(tmp_path: Path, moment: str) -> None:
    """Interrupted in the third of four optimizer steps, which have two batches each."""

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if moment == "between batches" and trainer.global_step == 2 and batch_idx % 2:
                raise KeyboardInterrupt

        def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
            if moment == "within a batch" and trainer.global_step == 2:
                raise KeyboardInterrupt

    def run(*callbacks: Callback, **options: Any) -> CostMonitor:
        last = LastCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
        settings = {"enable_checkpointing": True, "accumulate_grad_batches": 2, "limit_val_batches": 0, **options}
        return fit(tmp_path, draft(truncation=LastK(1)), 4, *callbacks, last, **settings)

    uninterrupted = run()
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(Interrupt())
    resumed = run(ckpt_path=str(tmp_path / "last.ckpt"))
    for name in ("reward_queries", "network_forwards", "network_backwards"):
        assert getattr(resumed, name) == getattr(uninterrupted, name)
    assert math.isfinite(resumed.seconds)


class Judge(LinearReward):
    """A reward that counts its calls."""

    calls = 0

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        return super().forward(images, prompts)

    def usage(self) -> dict[str, float]:
        return {"requests": self.calls}


def test_resumed_run_continues_the_usage_of_rewards(tmp_path: Path) -> None:
    used = 0.0
    for steps in (1, 2, 3):
        module = DraftModule(LinearModel(0.1), Judge(), DDIM(3))
        last = LastCheckpoint(every_n_steps=1, dirpath=str(tmp_path))
        path = str(tmp_path / "last.ckpt") if steps > 1 else None
        monitor = fit(tmp_path, module, steps, last, enable_checkpointing=True, limit_val_batches=0, ckpt_path=path)
        assert isinstance(module.reward, Judge)
        assert module.reward.calls > 0
        used += module.reward.calls
        assert monitor.state_dict()["requests"] == used


def test_usage_of_rewards_is_logged(tmp_path: Path) -> None:
    module = DraftModule(LinearModel(0.1), Judge(), DDIM(3), eval_rewards={"other": Judge()})
    logged: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["usage/requests"]))

    monitor = CostMonitor()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[monitor, Read()],
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, PromptDataModule(PROMPTS, batch_size=2, val_size=2))
    assert logged[1] == logged[0] + 1
    assert logged[1] == module.reward.calls
