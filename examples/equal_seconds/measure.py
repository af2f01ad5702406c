"""Train one setting for the given CPU seconds, and evaluate it on the way."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from examples.before_after import ordered
from examples.equal_seconds.experiments import Experiment, Setting
from examples.trainer import without_files
from lightning_draft.callbacks import GradientNormMonitor
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.metrics import within_prompt_diversity
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.rewards import Reward
from lightning_draft.samplers import DDIM

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
Rows = list[dict[str, float]]


class Curve(L.Callback):
    """Evaluate when fractions of the CPU seconds are used, and stop at the last.

    Args:
        experiment: The experiment, with the fractions.
        seconds: CPU seconds of the run.
        rewards: Rewards by name.
        prompts: Evaluation prompts, each of two images.
        start: The scores before the first step; by default they are computed.

    Attributes:
        evaluations: The model before the first step, then one row per milestone: seconds and steps so far, mean
            scores, and diversity within a prompt.
        curve: One row per step: seconds so far, and the gradient norm before clipping.
    """

    def __init__(
        self,
        experiment: Experiment,
        seconds: float,
        rewards: dict[str, Reward],
        prompts: list[str],
        start: dict[str, float] | None,
    ) -> None:
        self.rewards, self.exact_chain = rewards, experiment.exact_chain
        self.prompts = [prompt for prompt in prompts for _ in range(2)]
        self.milestones = [fraction * seconds for fraction in experiment.fractions]
        self.evaluations: Rows = [] if start is None else [start]
        self.curve: Rows = []
        self._used, self._start = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate the model before the first step, unless its scores were given."""
        if not self.evaluations:
            self._evaluate(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Record the gradient norm."""
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.curve.append({"seconds": self._used, "gradient_norm": torch.stack(norms).norm().item()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop the clock, and evaluate at a milestone."""
        self._used += time.process_time() - self._start
        if self._used >= self.milestones[0]:
            self.milestones = [each for each in self.milestones if each > self._used]
            self._evaluate(trainer, pl_module)
        trainer.should_stop = not self.milestones

    @torch.no_grad()
    def _evaluate(self, trainer: L.Trainer, module: DraftModule) -> None:
        row: dict[str, float] = {"seconds": self._used, "steps": trainer.global_step}
        with exact_mode(module.model) if self.exact_chain else nullcontext():
            images = self._images(module)
        row |= self._scores(self.rewards, images)
        row["diversity"] = within_prompt_diversity(images, self.prompts).item()
        if self.exact_chain:
            trained = {f"{name}, own chain": self.rewards[name] for name in ("reward", "evaluation")}
            row |= self._scores(trained, self._images(module))
        self.evaluations.append(row)

    def _images(self, module: DraftModule) -> Tensor:
        parts = [
            module.generate(self.prompts[i : i + 40], seed=10_000 + i).images for i in range(0, len(self.prompts), 40)
        ]
        return torch.cat(parts).clamp(0, 1)

    def _scores(self, rewards: dict[str, Reward], images: Tensor) -> dict[str, float]:
        return {name: reward(images, self.prompts).mean().item() for name, reward in rewards.items()}


@contextmanager
def exact_mode(model: Any) -> Iterator[None]:
    """Within this context, the model uses guidance in all steps and does not merge its adapters."""
    guidance, lora = model.guidance, model.lora
    try:
        model.guidance, model.lora = replace(guidance, interval=(0.0, 1.0)), replace(lora, merge=False)
        yield
    finally:
        model.guidance, model.lora = guidance, lora


def module_of(setting: Setting, reward: Reward, seed: int) -> DraftModule:
    """Return the module that trains a setting; the adapters are those of the quickstart."""
    lora = LoRA(rank=8, target_modules=LAYERS, seed=seed, merge=setting.merge)
    return DraftModule(
        model=StableDiffusion(setting.model, lora=lora, guidance=setting.guidance),
        reward=reward,
        sampler=DDIM(setting.num_steps),
        truncation=setting.truncation,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=setting.lr),
        seed=seed,
    )


def train(
    experiment: Experiment,
    setting: Setting,
    seed: int,
    truths: dict[str, Reward],
    seconds: float,
    prompts: int,
    start: dict[str, float] | None = None,
) -> Curve:
    """Train a setting for `seconds`, evaluating on the first `prompts` evaluation prompts; return what was recorded.

    `start` has the scores of the untrained model, which are the same for every seed; by default they are computed.
    """
    L.seed_everything(seed, verbose=False)
    task = experiment.task
    rewards = {"reward": task.reward(), **task.evaluation(), **truths}
    curve = Curve(experiment, seconds, rewards, ordered(f"{task.prompts}_eval")[:prompts], start)
    monitors = [GradientNormMonitor("skip", min_history=3)] if setting.skip else []
    trainer = without_files(curve, *monitors, max_steps=-1, accelerator="cpu", gradient_clip_val=setting.clip)
    data = PromptDataModule(task.prompts, batch_size=experiment.batch_size, seed=seed)
    trainer.fit(module_of(setting, task.reward(), seed), data)
    return curve
