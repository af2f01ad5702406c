"""Measure the cost and the result of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_draft.callbacks.cost import CostMonitor
from lightning_draft.methods.base import RewardModule
from lightning_draft.metrics import image_drift, within_prompt_diversity


@dataclass(frozen=True)
class Evaluation:
    """Evaluate on fixed prompts and noise, the same for every method and for the base model.

    Args:
        prompts: The evaluation prompts.
        images_per_prompt: Images per prompt.
        batch_size: Images per batch.
    """

    prompts: Sequence[str]
    images_per_prompt: int = 3
    batch_size: int = 48

    @torch.no_grad()
    def images(self, module: RewardModule) -> tuple[Tensor, list[str]]:
        """Return images `(N, 3, H, W)` in [0, 1] and their prompts; the random state is unchanged."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        starts = range(0, len(prompts), self.batch_size)
        images = [module.generate(prompts[i : i + self.batch_size], seed=10_000 + i) for i in starts]
        return torch.cat(images).float().clamp(0, 1), prompts

    def scores(self, module: RewardModule, base: Tensor) -> dict[str, float]:
        """Return mean scores, diversity within a prompt, and distance from the base model's images."""
        images, prompts = self.images(module)
        scores = {name: score.mean().item() for name, score in module.score(images, prompts).items()}
        return {
            **scores,
            "diversity": within_prompt_diversity(images, prompts).item(),
            "drift": image_drift(images, base).mean().item(),
        }


class Meter(CostMonitor):
    """Evaluate at given fractions of a budget of network passes, and stop training when it is used up.

    One pass is one forward or one backward pass of the denoiser over one latent; recomputation counts.

    Args:
        budget: Network passes.
        evaluate: Called at each milestone; its time and passes are not counted.
        milestones: Fractions of the budget.

    Attributes:
        curve: One row per optimizer step: cost so far, reward of the batch, and gradient norm.
        evaluations: One row per milestone: cost so far, and the result of `evaluate`.
    """

    def __init__(
        self,
        budget: int,
        evaluate: Callable[[], dict[str, float]],
        milestones: Sequence[float] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    ) -> None:
        super().__init__()
        self.budget = budget
        self.evaluate = evaluate
        self.milestones = [fraction * budget for fraction in milestones]
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self._norm = 0.0

    @property
    def passes(self) -> int:
        """Return the number of network passes so far."""
        return self.network_forwards + self.network_backwards

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record the gradient norm before clipping."""
        gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self._norm = torch.stack(gradients).norm().item()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Record a row, and evaluate at a milestone."""
        super().on_train_batch_end(trainer, pl_module, *args)
        reward = float(trainer.callback_metrics["train/reward"])
        self.curve.append({**self._spent(trainer), "reward": reward, "gradient_norm": self._norm})
        if self.milestones and self.passes >= self.milestones[0]:
            self.milestones = [passes for passes in self.milestones if passes > self.passes]
            self.evaluations.append({**self._spent(trainer), **self.evaluate()})
        trainer.should_stop = self.passes >= self.budget

    def _spent(self, trainer: L.Trainer) -> dict[str, float]:
        return {
            "steps": trainer.global_step,
            "forwards": self.network_forwards,
            "passes": self.passes,
            "queries": self.reward_queries,
            "seconds": round(self.seconds, 3),
        }
