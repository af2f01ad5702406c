"""Whether rewards pull the pictures the same way: the cosine between their gradients.

References:
    Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782 (gradients conflict where their cosine is
    negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import normalize

from lightning_draft.callbacks.random_state import observing
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.combine import WeightedSum, image_gradient


class RewardConflict(Callback):
    """Log the cosine between the gradients of every two rewards with respect to pictures of the current prompts.

    Looked at are the differentiable parts of the trained `WeightedSum` with a weight, or the trained reward itself as
    `reward`, and the differentiable watched rewards as `eval_rewards.<name>`. A part of negative weight pulls down its
    gradient, so the sign is turned. Logged under `conflict/`, averaged over the pictures: `cosine/<a>/<b>`, in [-1, 1],
    below 0 where what one gains the other loses; and `norm/<a>`, of the gradient of one picture's own score, without
    the weight. A look costs one sampling and one backward pass of each reward. Training with this callback is bitwise
    the training without it.

    Args:
        every_n_steps: Optimisation steps between looks.
        max_samples: How many of the batch's prompts are drawn, the first ones.
        seed: Of the starting noise and of a stochastic sampler's noise.
    """

    def __init__(self, every_n_steps: int = 50, max_samples: int = 4, seed: int = 0) -> None:
        if min(every_n_steps, max_samples) < 1:
            raise ConfigurationError("RewardConflict: every_n_steps and max_samples must be at least 1")
        self.every_n_steps = every_n_steps
        self.max_samples = max_samples
        self.seed = seed
        self._last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what has nothing to compare."""
        self._last_step = -1
        names = list(pulls(pl_module))
        if stage == "fit" and len(names) < 2:
            raise ConfigurationError(
                f"RewardConflict compares differentiable rewards, and there is {', '.join(names) or 'none'} only; "
                "train on a WeightedSum, or name others under `eval_rewards`"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every `every_n_steps` optimisation steps."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        metrics = {name: float(trainer.strategy.reduce(value)) for name, value in self._look(trainer, pl_module, batch)}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _look(self, trainer: L.Trainer, pl_module: Any, batch: Sequence[str]) -> list[tuple[str, Tensor]]:
        prompts = list(batch)[: self.max_samples]
        with observing(pl_module), trainer.precision_plugin.forward_context():
            images = pl_module.generate(prompts, seed=self.seed)
            found = {name: _gradient(*pull, images, prompts) for name, pull in pulls(pl_module).items()}
        units = {name: normalize(gradient, dim=1) for name, gradient in found.items()}
        norms = [(f"conflict/norm/{name}", gradient.norm(dim=1).mean()) for name, gradient in found.items()]
        return norms + [
            (f"conflict/cosine/{one}/{other}", (units[one] * units[other]).sum(1).mean())
            for one, other in combinations(units, 2)
        ]


def pulls(pl_module: Any) -> dict[str, tuple[Reward, float]]:
    """What a module trains on and what it watches, as far as it is differentiable, with the sign of its pull."""
    reward = pl_module.reward
    if isinstance(reward, WeightedSum):
        found = {name: (part, reward.weights[name]) for name, part in reward.components().items()}
    else:
        found = {"reward": (reward, 1.0)}
    watched = zip(pl_module.eval_reward_names, pl_module.eval_rewards, strict=True)
    found |= {f"eval_rewards.{name}": (part, 1.0) for name, part in watched}
    return {name: pull for name, pull in found.items() if pull[0].differentiable and pull[1] != 0}


def _gradient(reward: Reward, weight: float, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The direction `(B, C H W)` in which a reward pulls each image."""
    with torch.enable_grad():
        leaf = images.detach().float().requires_grad_()
        gradient = image_gradient(reward(leaf, prompts), leaf)
    return (gradient if weight > 0 else -gradient).flatten(1)
