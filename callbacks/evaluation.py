"""Evaluate a model on fixed prompts and noise: rewards, and image statistics that show over-optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from torch import Tensor

from lightning_draft.callbacks.common import FixedSamples, sampling
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.metrics import image_drift, saturated_pixel_fraction, within_prompt_diversity
from lightning_draft.rewards.color import Sharpness


@dataclass(frozen=True)
class Evaluation:
    """Means over the images of fixed prompts and noise.

    Attributes:
        reward: The trained reward.
        eval_rewards: Each evaluation reward, by name.
        image_drift: Root mean square difference of pixels from the base model's images, in [0, 1].
        diversity: Root mean square difference between images of the same prompt, in [0, 1].
        sharpness: Laplacian energy.
        saturated_pixel_fraction: Fraction of values that are at most 0 or at least 1, in [0, 1].
    """

    reward: float
    eval_rewards: dict[str, float]
    image_drift: float
    diversity: float
    sharpness: float
    saturated_pixel_fraction: float

    def metrics(self) -> dict[str, float]:
        """Return all values by log key."""
        plain = {name: value for name, value in asdict(self).items() if name != "eval_rewards"}
        return {**plain, **{f"eval/{name}": value for name, value in self.eval_rewards.items()}}


class Evaluator:
    """Generate images from fixed prompts and noise at any time in training, and compare them with the base model's.

    Args:
        samples: Prompts and noise; each prompt occurs at least twice.
        eval_rewards: Names of the evaluation rewards.

    Attributes:
        base: The evaluation of the base model.
        scales: Standard deviation of each evaluation reward over the base model's images; 1 if all are equal.
    """

    base: Evaluation
    scales: dict[str, float]

    def __init__(self, samples: FixedSamples, eval_rewards: list[str]) -> None:
        self.samples = samples
        self.eval_rewards = eval_rewards
        self._base_images: Tensor | None = None
        self._base_state: dict[str, Any] | None = None

    def evaluate_base(self, trainer: L.Trainer, module: RewardModule) -> None:
        """Generate and evaluate images of the base model; a resumed run uses the values in its checkpoint."""
        with sampling(trainer, module), module.model.base():
            samples = self.samples.generate(module)
            scores = {} if self._base_state else self.samples.score(module, samples)
        self._base_images = samples.content
        if self._base_state:
            self.base, self.scales = Evaluation(**self._base_state["base"]), self._base_state["scales"]
            return
        scales = {name: float(scores[name].std(correction=0)) or 1.0 for name in self.eval_rewards}
        self.scales = trainer.strategy.broadcast(scales)
        self.base = trainer.strategy.broadcast(self._evaluation(samples.content, scores))
        self._base_state = {"base": asdict(self.base), "scales": self.scales}

    def evaluate(self, trainer: L.Trainer, module: RewardModule) -> Evaluation:
        """Evaluate the current model; all processes receive the result of process 0."""
        with sampling(trainer, module):
            samples = self.samples.generate(module)
            scores = self.samples.score(module, samples)
        return trainer.strategy.broadcast(self._evaluation(samples.content, scores))

    def state_dict(self) -> dict[str, Any] | None:
        """Return the evaluation of the base model, if there is one."""
        return self._base_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use a saved evaluation of the base model."""
        self._base_state = state_dict

    def _evaluation(self, images: Tensor, scores: Mapping[str, Tensor]) -> Evaluation:
        assert self._base_images is not None
        prompts = self.samples.prompts
        return Evaluation(
            reward=float(scores["reward"].mean()),
            eval_rewards={name: float(scores[name].mean()) for name in self.eval_rewards},
            image_drift=float(image_drift(images, self._base_images).mean()),
            diversity=float(within_prompt_diversity(images, prompts)),
            sharpness=float(Sharpness()(images.clamp(0, 1), prompts).mean()),
            saturated_pixel_fraction=float(saturated_pixel_fraction(images).mean()),
        )


def select_eval_rewards(names: list[str] | None, module: RewardModule) -> list[str]:
    """Return the names of the evaluation rewards to compare with.

    Args:
        names: Names that the user gave; `None` for all evaluation rewards of the module.
        module: The module.

    Raises:
        ConfigurationError: The module has no evaluation rewards, or none with a given name.
    """
    known = module.eval_reward_names
    if not known:
        raise ConfigurationError(
            "OverOptimizationGuard compares the trained reward with evaluation rewards, and the module has none; give "
            "it rewards that are not trained on, such as eval_rewards=dict(sharpness=Sharpness())"
        )
    unknown = sorted(set(names or []) - set(known))
    if names == []:
        raise ConfigurationError(
            "OverOptimizationGuard: eval_rewards=[] is empty; leave it out to compare with all evaluation rewards"
        )
    if unknown:
        raise ConfigurationError(
            f"OverOptimizationGuard: eval_rewards={names} contains {', '.join(unknown)}, which the module does not "
            "evaluate; write some of "
            f"{', '.join(known)}"
        )
    return known if names is None else names
