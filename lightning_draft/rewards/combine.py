"""Sums of rewards: weighted, standardized by running statistics, or with equal gradient norms.

References:
    Chen et al., "GradNorm", arXiv:1711.02257 (equal gradient norms). Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_draft.arguments import at_least, integer_at_least, is_finite
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward, check_name, check_scores
from lightning_draft.rewards.inputs import check_prompts
from lightning_draft.rewards.samples import Samples, Scorable

Scored = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class WeightedReward:
    """A component of a sum of rewards.

    Args:
        reward: The component.
        weight: Its factor, of either sign; a component of weight 0 is only logged.
        threshold: A score that is high enough: the component is replaced by `min(score, threshold)`, or for a negative
            weight by `max(score, threshold)`, so that its gradient is 0 beyond the threshold. None for no threshold.
        width: Width of a smooth corner, in units of the score: the minimum becomes
            `threshold - width softplus((threshold - score) / width)`, whose gradient at the threshold is a half.

    Raises:
        ConfigurationError: A number is not finite, the width is negative, or a width is given without a threshold.
    """

    reward: Reward
    weight: float = 1.0
    threshold: float | None = None
    width: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("threshold", self.threshold), ("width", self.width)):
            if value is not None and not is_finite(value):
                raise ConfigurationError(f"{name}={value!r} of {type(self.reward).__name__} must be finite; write 1.0")
        at_least("width", self.width, 0.0)
        if self.width > 0 and self.threshold is None:
            raise ConfigurationError(f"width={self.width} needs a threshold; write threshold, or leave width out")

    def capped(self, score: Tensor) -> Tensor:
        """Return the score up to the threshold, and about the threshold beyond it."""
        if self.threshold is None:
            return score
        sign = -1.0 if self.weight < 0 else 1.0
        missing = sign * (self.threshold - score)
        soft = F.relu(missing) if self.width == 0 else self.width * F.softplus(missing / self.width)
        return self.threshold - sign * soft


class WeightedSum(Reward):
    """`sum_i weight_i reward_i`.

    The breakdown contains the score of each component by name, without weight and threshold. The sum is differentiable
    if every component with a weight other than 0 is differentiable. Images are decoded if a component scores images.

    Args:
        rewards: Components by name. Names consist of letters, digits, `_` and `-`, and become log keys.

    Raises:
        ConfigurationError: There are no components, all weights are 0, or a name is not valid.
    """

    def __init__(self, rewards: dict[str, WeightedReward]) -> None:
        super().__init__()
        if not isinstance(rewards, dict) or not all(isinstance(part, WeightedReward) for part in rewards.values()):
            raise ConfigurationError(
                f"rewards={rewards!r} must map names to weighted rewards, such as "
                "{'bright': WeightedReward(Brightness(), weight=1.0)}"
            )
        if not any(component.weight for component in rewards.values()):
            raise ConfigurationError(
                f"{type(self).__name__} needs a reward with a weight other than 0, or its score is constant; add one "
                "under `rewards`"
            )
        self.weights = {check_name(name): component.weight for name, component in rewards.items()}
        self.rewards = nn.ModuleList(component.reward for component in rewards.values())
        self.differentiable = all(
            component.reward.differentiable for component in rewards.values() if component.weight != 0
        )
        self.uses_images = any(component.reward.uses_images for component in rewards.values())
        self.uses_latents = any(component.reward.uses_latents for component in rewards.values())
        self._caps = {name: component.capped for name, component in rewards.items()}

    def inputs(self, samples: Scorable) -> Samples:
        """Return the samples, without images that no component scores; each component takes its input from them."""
        samples = Samples.of(samples)
        return samples if self.uses_images or samples.latents is None else Samples(samples.latents)

    def forward(self, samples: Samples, prompts: Sequence[str]) -> Tensor:  # type: ignore[override]
        """Score `B` samples to `(B,)`; components of weight 0 are not computed."""
        active = [name for name, weight in self.weights.items() if weight != 0]
        return self._total(samples, self._scores(samples, prompts, active))

    def breakdown(self, samples: Scorable, prompts: Sequence[str]) -> Scored:
        """Compute the sum `(B,)` and every component `(B,)` by name; nested components are `outer/inner`."""
        samples = self.inputs(samples)
        found = self._scores(samples, check_prompts(prompts, len(samples)), self.weights)
        scores: dict[str, Tensor] = {}
        for name, (score, inner) in found.items():
            scores[name] = score
            scores.update({f"{name}/{key}": value for key, value in inner.items()})
        return self._total(samples, found), scores

    def components(self) -> dict[str, Reward]:
        """Return the components by name."""
        return dict(zip(self.weights, cast(Iterable[Reward], self.rewards), strict=True))

    @property
    def needs_calibration(self) -> bool:
        """Whether a component needs calibration."""
        return any(component.needs_calibration for component in self.components().values())

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Update the statistics of nested components."""
        for name, component in self.components().items():
            head = f"{name}/"
            component.update_statistics(
                {key.removeprefix(head): value for key, value in scores.items() if key.startswith(head)}
            )

    def _scores(self, samples: Samples, prompts: Sequence[str], names: Iterable[str]) -> dict[str, Scored]:
        components = self.components()
        return {name: self._score(name, components[name], samples, prompts) for name in names}

    def _score(self, name: str, reward: Reward, samples: Samples, prompts: Sequence[str]) -> Scored:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[name] != 0):
            try:
                score, inner = reward.breakdown(samples, prompts)
                return check_scores(score, len(samples), reward), inner
            except ConfigurationError as error:
                raise ConfigurationError(f"reward {name!r}: {error}") from error

    def _total(self, samples: Samples, found: Mapping[str, Scored]) -> Tensor:
        total = torch.zeros(len(samples), device=samples.device)
        for name, (score, _) in found.items():
            if self.weights[name] != 0:
                total = total + self.weights[name] * self._scaled(name, self._caps[name](score))
        return total

    def _scaled(self, name: str, score: Tensor) -> Tensor:
        """Return a component's score on the scale on which components are added."""
        return score


class ZScoreSum(WeightedSum):
    """`sum_i weight_i (reward_i - mean_i) / std_i`, with running statistics of each component's scores in training.

    Components with different units become comparable. The statistics start with at least 16 images of the first
    prompts, are updated after each batch of training images and never in validation, are equal on all processes, and
    are part of the checkpoint. Thresholds are in the units of the component. Before there are statistics, mean 0 and
    std 1 are used.

    Args:
        rewards: Components by name, as in `WeightedSum`.
        memory: Number of images, at least 2. The statistics cover all images up to this number, and then decay
            exponentially with this time constant.

    Raises:
        ConfigurationError: As in `WeightedSum`, or the memory is less than 2.
    """

    def __init__(self, rewards: dict[str, WeightedReward], memory: int = 4096) -> None:
        super().__init__(rewards)
        self.memory = integer_at_least("memory", memory, 2)
        self.moments = {name: RunningMoments(memory) for name, weight in self.weights.items() if weight != 0}

    @property
    def needs_calibration(self) -> bool:
        """Whether there are no statistics yet."""
        return super().needs_calibration or any(moments.count == 0 for moments in self.moments.values())

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Update the statistics with the scores of training images."""
        super().update_statistics(scores)
        for name, moments in self.moments.items():
            moments.update(scores[name])

    def get_extra_state(self) -> dict[str, list[float]]:
        """Return the statistics, for the state dict."""
        return {name: [moments.count, moments.mean, moments.variance] for name, moments in self.moments.items()}

    def set_extra_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore saved statistics."""
        for name, moments in self.moments.items():
            if name in state:
                moments.count, moments.mean, moments.variance = state[name]

    def _scaled(self, name: str, score: Tensor) -> Tensor:
        return (score - self.moments[name].mean) / self.moments[name].std


class GradientNormSum(WeightedSum):
    """`sum_i weight_i reward_i` with the gradient `sum_i weight_i c g_i / |g_i|`: components have equal gradient norms.

    `g_i` is the gradient of the component's score with respect to one image, or to its latent if the components score
    latents, and `c` the mean of the norms `|g_i|` over the components for this image, so that a sum of one component
    equals that component. A component whose gradient is 0 contributes 0. Thresholds are applied after the norms are
    made equal, so that a component's contribution is 0 beyond its threshold. The value is the plain weighted sum, and
    the gradient is not the gradient of this value. Each component's graph is freed before the next component runs.

    Args:
        rewards: Components by name, as in `WeightedSum`.

    Raises:
        ConfigurationError: As in `WeightedSum`, or some components score images and others latents.
    """

    def __init__(self, rewards: dict[str, WeightedReward]) -> None:
        super().__init__(rewards)
        if self.uses_images and self.uses_latents:
            raise ConfigurationError(
                "GradientNormSum compares gradients, and some of its rewards score images and others latents; write "
                "WeightedSum or ZScoreSum, or use rewards of one kind"
            )

    def _scores(self, samples: Samples, prompts: Sequence[str], names: Iterable[str]) -> dict[str, Scored]:
        if not (torch.is_grad_enabled() and samples.requires_grad):
            return super()._scores(samples, prompts, names)
        x = samples.content if samples.content.dtype == torch.float64 else samples.content.float()
        found: dict[str, Scored] = {}
        gradients: dict[str, Tensor] = {}
        for name in names:
            leaf = x.detach().requires_grad_()
            score, inner = super()._scores(samples.with_content(leaf), prompts, [name])[name]
            if self.weights[name] != 0:
                gradients[name] = image_gradient(score, leaf)
            found[name] = score.detach(), {key: value.detach() for key, value in inner.items()}
        norms = {name: gradient.flatten(1).norm(dim=1) for name, gradient in gradients.items()}
        common = torch.stack(list(norms.values())).mean(0)
        for name, gradient in gradients.items():
            factor = torch.where(norms[name] > 0, common / norms[name], 0.0)
            slope = factor.view(-1, *[1] * (x.dim() - 1)) * gradient
            # The added term has value 0 and gradient `slope`, so that only the gradient of the score changes.
            found[name] = found[name][0] + (slope * (x - x.detach())).flatten(1).sum(1), found[name][1]
        return found


class RunningMoments:
    """Running mean and variance of batches of numbers.

    The first `memory` numbers have equal weight (Chan's update, which is exact); after that a batch of `b` numbers has
    the weight `b / (memory + b)`.

    Args:
        memory: Number of numbers after which older ones lose weight.

    Attributes:
        count: Number of numbers that the statistics cover, at most `memory`.
        mean: Their mean.
        variance: Their variance, divided by the count.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.count, self.mean, self.variance = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Standard deviation, or 1 if the numbers are equal up to rounding."""
        std = self.variance**0.5
        return std if std > 1e-6 * abs(self.mean) else 1.0

    def update(self, values: Tensor) -> None:
        """Update the statistics with at least one number, in a tensor of any shape."""
        values = values.detach().double()
        size, mean, variance = values.numel(), float(values.mean()), float(values.var(correction=0))
        total, shift = self.count + size, mean - self.mean
        self.mean += shift * size / total
        within = self.count * self.variance + size * variance
        self.variance = (within + shift**2 * self.count * size / total) / total
        self.count = min(total, float(self.memory))


def image_gradient(scores: Tensor, images: Tensor) -> Tensor:
    """Return the gradient `(B, ...)` of each image's or latent's score, 0 if there is none, and free the graph."""
    if not scores.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient
