"""Measure the conflict between rewards by the cosine similarity of their gradients.

References:
    Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782 (a negative cosine is a conflict).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import normalize

from lightning_draft.arguments import integer_at_least
from lightning_draft.callbacks.common import reward_module, sampling
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.combine import WeightedSum, image_gradient
from lightning_draft.seeds import check_seed


class RewardConflict(Callback):
    """Log the cosine similarity of the gradients of each pair of rewards with respect to images of the current prompts.

    The compared rewards are the differentiable components of the trained `WeightedSum` with a weight other than 0, or
    the trained reward itself as `reward`, and the differentiable evaluation rewards as `eval_rewards.<name>`; rewards
    of latents are left out. The gradient of a component with a negative weight is negated. The log keys, averaged over
    the images, are `conflict/cosine/<a>/<b>`, in [-1, 1], negative if raising one reward lowers the other, and
    `conflict/norm/<a>`, the norm of the gradient of the score of one image, without the weight.

    Note:
        A measurement costs one generation of images and one backward pass of each reward. Training gives bitwise the
        same result as without this callback.

    Example:
        ```python
        reward = WeightedSum({"aesthetic": WeightedReward(AestheticScore()), "size": WeightedReward(JPEGSize(), -0.1)})
        trainer = Trainer(max_steps=1000, callbacks=[RewardConflict(every_n_steps=20)])
        ```

    Args:
        every_n_steps: Optimization steps between measurements.
        max_samples: Number of prompts of the batch that are sampled; the first ones are used.
        seed: Seed of the starting noise and of a stochastic sampler's noise.
    """

    def __init__(self, every_n_steps: int = 50, max_samples: int = 4, seed: int = 0) -> None:
        self.every_n_steps = integer_at_least("RewardConflict: every_n_steps", every_n_steps, 1)
        self.max_samples = integer_at_least("RewardConflict: max_samples", max_samples, 1)
        self.seed = check_seed(seed)
        self._last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there are two rewards to compare."""
        self._last_step = -1
        if stage != "fit":
            return
        names = list(signed_rewards(reward_module(pl_module, self)))
        if len(names) < 2:
            raise ConfigurationError(
                f"RewardConflict needs at least two differentiable rewards of images to compare, and the module has "
                f"{f'only {names[0]}' if names else 'none'}; train on a WeightedSum, or add rewards to the module's "
                "eval_rewards"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every `every_n_steps` optimization steps."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        metrics = {
            name: float(trainer.strategy.reduce(value))
            for name, value in self._measure(trainer, reward_module(pl_module, self), batch)
        }
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _measure(self, trainer: L.Trainer, module: RewardModule, batch: Sequence[str]) -> list[tuple[str, Tensor]]:
        prompts = list(batch)[: self.max_samples]
        with sampling(trainer, module):
            images = module.generate(prompts, seed=self.seed).content
            found = {name: _gradient(*each, images, prompts) for name, each in signed_rewards(module).items()}
        units = {name: normalize(gradient, dim=1) for name, gradient in found.items()}
        norms = [(f"conflict/norm/{name}", gradient.norm(dim=1).mean()) for name, gradient in found.items()]
        return norms + [
            (f"conflict/cosine/{one}/{other}", (units[one] * units[other]).sum(1).mean())
            for one, other in combinations(units, 2)
        ]


def signed_rewards(module: RewardModule) -> dict[str, tuple[Reward, float]]:
    """Return the differentiable rewards of images that a module trains on or evaluates, with their weights.

    The weight of evaluation rewards is 1.
    """
    reward = module.reward
    if isinstance(reward, WeightedSum):
        found = {name: (component, reward.weights[name]) for name, component in reward.components().items()}
    else:
        found = {"reward": (reward, 1.0)}
    evaluated = zip(module.eval_reward_names, cast(Iterable[Reward], module.eval_rewards), strict=True)
    found |= {f"eval_rewards.{name}": (other, 1.0) for name, other in evaluated}
    return {
        name: (each, weight)
        for name, (each, weight) in found.items()
        if each.differentiable and not each.uses_latents and weight != 0
    }


def _gradient(reward: Reward, weight: float, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the gradient `(B, C H W)` of each image's score, negated for a negative weight."""
    with torch.enable_grad():
        leaf = images.detach().float().requires_grad_()
        gradient = image_gradient(reward(leaf, prompts), leaf)
    return (gradient if weight > 0 else -gradient).flatten(1)
