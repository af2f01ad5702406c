"""All callbacks at once with a small Stable Diffusion: neither the callbacks nor a resume change training."""

import ast
import copy
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

import lightning_draft
from lightning_draft import callbacks
from lightning_draft.callbacks import (
    AdapterEMA,
    CostMonitor,
    GradientNormMonitor,
    LastCheckpoint,
    LoRAExport,
    OverOptimizationGuard,
    ProgressBar,
    RandomState,
    RewardConflict,
    SampleLogger,
)
from lightning_draft.data import PromptDataModule
from lightning_draft.rewards.color import ColorBalance, ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LowVariance, RandomK

PROMPTS = ["red", "cat", "a cat", "red cat", "dog", "a dog", "bird"]


class Trace(Callback):
    """Records prompts, rewards, gradients, and numbers of the global generators."""

    def __init__(self):
        self.prompts, self.rewards, self.gradients, self.random_numbers = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.prompts.append(list(batch))
        self.random_numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(
            {name: p.grad.clone() for name, p in pl_module.trainable_parameters().items() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer, *_):
        self.rewards.append(trainer.callback_metrics["train/reward"].item())

    def record(self):
        return {name: getattr(self, name) for name in ("prompts", "rewards", "gradients", "random_numbers")}


def observers(folder):
    return [
        SampleLogger(every_n_steps=2, prompts=["red cat", "dog"], dirpath=str(folder / "samples")),
        LoRAExport(every_n_steps=1, dirpath=str(folder / "lora")),
        GradientNormMonitor("skip", min_history=1, factor=1e6, every_n_steps=1, figure_every_n_steps=1),
        AdapterEMA(0.9),
        ProgressBar(every_n_steps=1),
        RandomState(),
        LastCheckpoint(every_n_steps=2, dirpath=str(folder / "checkpoints")),
        CostMonitor(),
        OverOptimizationGuard(max_prompts=1, samples_per_prompt=2, dirpath=str(folder / "lora")),
        RewardConflict(every_n_steps=2, max_samples=1),
    ]


def equal(a, b):
    """Return whether nested containers of tensors are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture
def train(make_diffusion_module, make_trainer):
    """Train; return the module, the trace, the optimizer's state and the generators' state."""

    def fit(extra, steps, ckpt_path=None, seed=0, validate=True, accumulate=1, logger=False, **options):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        module, trace = make_diffusion_module(eval_rewards={"red": ColorBalance()}, **options), Trace()
        trainer = make_trainer(
            *extra,
            trace,
            max_steps=steps,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in extra),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in extra),
            logger=logger,
            accumulate_grad_batches=accumulate,
            val_check_interval=2 if validate else 1.0,
            limit_val_batches=1 if validate else 0,
        )
        trainer.fit(module, PromptDataModule(PROMPTS, batch_size=2, val_size=2), ckpt_path=ckpt_path)
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        return module, trace, optimizer, (random.random(), np.random.rand(), torch.rand(()).item())

    return fit


@pytest.mark.parametrize(
    "options",
    [{"truncation": LowVariance(2), "sampler": DDIM(3, eta=1.0)}, {"truncation": RandomK(), "kl_weight": 0.1}],
)
def test_training_with_all_callbacks_equals_training_without(train, tmp_path, options):
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    watched, watched_trace, *watched_states = train(observers(tmp_path), 3, logger=logger, **options)
    plain, plain_trace, *plain_states = train([], 3, validate=False, **options)
    assert equal(watched.state_dict(), plain.state_dict())
    assert equal(watched_trace.record(), plain_trace.record())
    assert equal(watched_states, plain_states)
    assert watched.training == plain.training
    assert any(gradient.any() for gradient in plain_trace.gradients[-1].values())
    assert len(list((tmp_path / "samples").iterdir())) == 3


def test_resumed_run_with_all_callbacks_equals_uninterrupted_run(train, tmp_path):
    """Interrupted within an epoch, with all callbacks; all states are compared."""

    def saver():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    options = {"truncation": RandomK(), "sampler": DDIM(3, eta=1.0), "accumulate": 2}
    first, second = observers(tmp_path / "first"), observers(tmp_path / "second")
    whole, whole_trace, *whole_states = train([*first, saver()], 4, **options)
    resumed, resumed_trace, *resumed_states = train(second, 4, tmp_path / "step=2.ckpt", seed=99, **options)

    assert equal(resumed.state_dict(), whole.state_dict())
    assert equal(resumed_states, whole_states)
    for name, values in resumed_trace.record().items():
        assert len(values) == (2 if name == "gradients" else 4)
        assert equal(values, whole_trace.record()[name][-len(values) :]), name
    for ours, theirs in zip(second, first, strict=True):
        if isinstance(ours, (AdapterEMA, GradientNormMonitor, RandomState)):
            assert equal(ours.state_dict(), theirs.state_dict()), type(ours).__name__
    ours, theirs = (tmp_path / name / "samples" / "step_000004.png" for name in ("second", "first"))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (load_file(tmp_path / name / "lora" / "last.safetensors") for name in ("second", "first"))
    assert equal(ours, theirs)


class Explosive(ColorTarget):
    """Its slope is multiplied by 100,000 while it is active."""

    armed = False

    def forward(self, images, prompts):
        return super().forward(images, prompts) * (1e5 if self.armed else 1.0)


class Arm(Callback):
    """Activates the reward's large slope in the fourth optimization step."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.reward.armed = trainer.global_step == 3


@pytest.mark.parametrize("action", ["skip", "clip"])
def test_an_exploding_gradient_triggers_the_action(train, action):
    class Adapters(Callback):
        def __init__(self):
            self.after = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.after[trainer.global_step] = copy.deepcopy(
                (pl_module.trainable_parameters(), trainer.optimizers[0].state_dict()["state"])
            )

    monitor = GradientNormMonitor(action, min_history=3, every_n_steps=1, figure_every_n_steps=0)
    adapters = Adapters()
    with pytest.warns(UserWarning, match=r"gradient norm .* at step 3 exceeds .* \(10 times the running median\)"):
        _, trace, *_ = train([Arm(), monitor, adapters], 5, reward=Explosive(1.0, 0.0, 0.0), validate=False)
    done = {"skip": "skipped", "clip": "clipped"}[action]
    assert {name: count for name, count in monitor.counts.items() if count} == {done: 1}
    assert monitor.history[3] > 1e3 * max(list(monitor.history)[:3])
    assert equal(adapters.after[4], adapters.after[3]) == (action == "skip")
    assert not equal(adapters.after[5], adapters.after[4])
    if action == "clip":
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in trace.gradients[3].values()))
        assert norm == pytest.approx(10 * sorted(list(monitor.history)[:3])[1], rel=1e-5)


def test_package_does_not_import_callbacks():
    """The command line, which combines all parts, is excluded."""
    root = Path(lightning_draft.__file__).parent
    outside = ("callbacks", "configs", "cli", "__main__.py")
    files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in outside]
    assert len(files) > 15
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = getattr(node, "module", None) or ""
            assert not any(name.startswith("lightning_draft.callbacks") for name in [module, *names]), path
            assert not (module == "lightning_draft" and "callbacks" in names), path


def test_list_covers_every_callback(tmp_path):
    assert {type(callback).__name__ for callback in observers(tmp_path)} == set(callbacks.__all__)
