"""Train one setting for the given CPU seconds, and evaluate it on the way."""

import time
from typing import Any

import lightning as L
import torch

from examples.before_after import ordered
from examples.equal_seconds.experiments import Experiment, Setting
from examples.trainer import without_files
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.metrics import within_prompt_diversity
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards import Reward
from lightning_draft.samplers import DDIM

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
FRACTIONS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
Rows = list[dict[str, float]]


class Curve(L.Callback):
    """Evaluate when fractions of the CPU seconds are used, and stop at the last.

    Attributes:
        evaluations: One row per milestone: seconds and steps so far, mean scores, and diversity within a prompt.
        curve: One row per step: seconds so far, and the gradient norm before clipping.
    """

    def __init__(self, seconds: float, rewards: dict[str, Reward], prompts: list[str]) -> None:
        self.rewards, self.prompts = rewards, prompts
        self.milestones = [fraction * seconds for fraction in FRACTIONS]
        self.evaluations: Rows = []
        self.curve: Rows = []
        self._used, self._start = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate the model before the first step."""
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
        self._evaluate(trainer, pl_module)
        trainer.should_stop = not self.milestones

    @torch.no_grad()
    def _evaluate(self, trainer: L.Trainer, module: DraftModule) -> None:
        if not self.milestones or self._used < self.milestones[0]:
            return
        self.milestones = [each for each in self.milestones if each > self._used]
        prompts = [prompt for prompt in self.prompts for _ in range(2)]
        images = torch.cat([module.generate(prompts[i : i + 40], seed=10_000 + i) for i in range(0, len(prompts), 40)])
        images = images.clamp(0, 1)
        scores = {name: reward(images, prompts).mean().item() for name, reward in self.rewards.items()}
        diversity = within_prompt_diversity(images, prompts).item()
        self.evaluations.append({"seconds": self._used, "steps": trainer.global_step, **scores, "diversity": diversity})


def module_of(setting: Setting, reward: Reward, seed: int) -> DraftModule:
    """Return the module that trains a setting; the adapters are those of the quickstart."""
    lora = LoRA(rank=8, target_modules=LAYERS, seed=seed)
    return DraftModule(
        model=StableDiffusion(setting.model, lora=lora, guidance=Guidance(1.0)),
        reward=reward,
        sampler=DDIM(setting.num_steps),
        truncation=setting.truncation,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=setting.lr),
    )


def train(
    experiment: Experiment, setting: Setting, seed: int, truths: dict[str, Reward], seconds: float, prompts: int
) -> Curve:
    """Train a setting for `seconds`, evaluating on the first `prompts` evaluation prompts; return what was recorded."""
    L.seed_everything(seed, verbose=False)
    task = experiment.task
    rewards = {"reward": task.reward(), **task.evaluation(), **truths}
    curve = Curve(seconds, rewards, ordered(f"{task.prompts}_eval")[:prompts])
    trainer = without_files(curve, max_steps=-1, accelerator="cpu")
    trainer.fit(
        module_of(setting, task.reward(), seed), PromptDataModule(task.prompts, batch_size=experiment.batch_size)
    )
    return curve
