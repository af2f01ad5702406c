"""Measure the cost and the result of a run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from examples.emoji_model.truth import ReferencePSNR, SceneRecognized
from lightning_draft.callbacks import CostMonitor
from lightning_draft.image_generation import generate
from lightning_draft.metrics import image_drift, within_prompt_diversity
from lightning_draft.models import PipelineModel
from lightning_draft.rewards import CleanFraction, ImageQuality, Reward
from lightning_draft.samplers import DDIM

RECOGNIZED = 0.95
Row = dict[str, float]
Stop = Callable[[Row, int], bool]
"""Takes the scores at a milestone and its number; returns whether training should end there."""


def never(scores: Row, milestone: int) -> bool:
    """Never end training early."""
    return False


def rewards(clean_images: Path) -> dict[str, Reward]:
    """Return the trained reward, and rewards that are not trained on.

    The comparisons with the captions' clean images are left out if there is no such file.
    """
    known: dict[str, Reward] = {
        "reward": ImageQuality("emoji64-judge"),
        "evaluation": ImageQuality("emoji64-judge-eval"),
        "clean": CleanFraction("emoji64-judge-eval"),
    }
    if clean_images.exists():
        known |= {"PSNR": ReferencePSNR(str(clean_images)), "recognized": SceneRecognized(str(clean_images))}
    return known


def is_valid(scores: Row) -> bool:
    """Return whether at least 95 % of the images still show what the caption names; true if that was not measured."""
    return scores.get("recognized", 1.0) >= RECOGNIZED


def objective(scores: Row) -> float:
    """Return the score of a tuning trial: the evaluation, minus 10 per unit of recognition below 95 %.

    Without the penalty, tuning chooses a learning rate at which both classifiers are satisfied by images that no longer
    show the caption.
    """
    return scores["evaluation"] - 10 * max(0.0, RECOGNIZED - scores.get("recognized", 1.0))


class Evaluation:
    """Score a model on fixed prompts and noise: deterministic steps, the same for every method.

    Args:
        rewards: The rewards by name.
        prompts: The prompts.
        images_per_prompt: Images per prompt.
        seed: Seed of the noise.
        num_steps: Sampling steps.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        prompts: Sequence[str],
        images_per_prompt: int,
        seed: int,
        num_steps: int = 10,
    ) -> None:
        self.rewards, self.seed, self.sampler = rewards, seed, DDIM(num_steps)
        self.prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        self._base: Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: PipelineModel) -> Row:
        """Return mean scores, diversity within a prompt, and distance from the images of the first call."""
        images = generate(model, self.sampler, self.prompts, self.seed, batch_size=32).images.clamp(0, 1)
        self._base = images if self._base is None else self._base
        scores = {name: reward(images, self.prompts).mean().item() for name, reward in self.rewards.items()}
        diversity = within_prompt_diversity(images, self.prompts).item()
        return {**scores, "diversity": diversity, "drift": image_drift(images, self._base).mean().item()}


class Meter(CostMonitor):
    """Evaluate at given CPU seconds of training, and stop at the last.

    Args:
        milestones: CPU seconds of training; the time of evaluations is not counted.
        evaluate: Returns the scores of a model.
        start: The scores before the first step.
        stop: Whether to end training at a milestone.

    Attributes:
        evaluations: One row per milestone: cost so far, and scores; the first is the untrained model.
        curve: One row per optimizer step: CPU seconds so far, and the gradient norm before clipping.
    """

    def __init__(
        self,
        milestones: Sequence[float],
        evaluate: Callable[[PipelineModel], Row],
        start: Row,
        stop: Stop = never,
    ) -> None:
        super().__init__()
        self.milestones, self.evaluate, self.stop = list(milestones), evaluate, stop
        self.cpu_seconds, self._cpu_started = 0.0, 0.0
        self.evaluations: list[Row] = [{**self._spent(0), **start}]
        self.curve: list[Row] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_batch_start(*args)
        self._cpu_started = time.process_time()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record the gradient norm before clipping."""
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.curve.append({"seconds": self.cpu_seconds, "gradient_norm": torch.stack(norms).norm().item()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop the clock, and evaluate at a milestone."""
        super().on_train_batch_end(trainer, pl_module, *args)
        self.cpu_seconds += time.process_time() - self._cpu_started
        passed = sum(milestone <= self.cpu_seconds for milestone in self.milestones)
        if passed:
            del self.milestones[:passed]
            scores = self.evaluate(pl_module.model)
            self.evaluations.append({**self._spent(trainer.global_step), **scores})
            stopped = self.stop(scores, len(self.evaluations) - 1)
            trainer.should_stop = stopped or not self.milestones

    def _spent(self, steps: int) -> Row:
        spent = {"steps": steps, "queries": self.reward_queries}
        return {"seconds": self.cpu_seconds, **spent, "passes": self.network_forwards + self.network_backwards}
