"""Sums of rewards: weighted, with every part on one scale, or with every part pulling alike.

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

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward, check_name, check_scores

Scored = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class WeightedReward:
    """A part of a sum.

    Args:
        reward: The part.
        weight: Its factor, of either sign; a part of weight 0 is only logged.
        threshold: The score that is good enough: the part counts as `min(score, threshold)`, for a negative weight as
            `max(score, threshold)`, so that it stops pulling there. By default it never does.
        width: Softness of that corner, in units of the score: at the threshold the pull has fallen to a half.

    Raises:
        ConfigurationError: The width is negative, or there is no threshold for it.
    """

    reward: Reward
    weight: float = 1.0
    threshold: float | None = None
    width: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 0 or (self.width > 0 and self.threshold is None):
            raise ConfigurationError(f"width={self.width} must not be negative, and needs a threshold to soften")

    def capped(self, score: Tensor) -> Tensor:
        """What a score counts as."""
        if self.threshold is None:
            return score
        sign = -1.0 if self.weight < 0 else 1.0
        missing = sign * (self.threshold - score)
        soft = F.relu(missing) if self.width == 0 else self.width * F.softplus(missing / self.width)
        return self.threshold - sign * soft


class WeightedSum(Reward):
    """`sum_i weight_i reward_i`; the breakdown holds every part's own score by name: no weight, no threshold.

    Differentiable where every part is whose weight is not 0.

    Args:
        rewards: Parts by name; names are letters, digits, `_` and `-`, and are what the parts are logged as.

    Raises:
        ConfigurationError: There are no parts, all weights are 0, or a name cannot be used.
    """

    def __init__(self, rewards: dict[str, WeightedReward]) -> None:
        super().__init__()
        if not any(part.weight for part in rewards.values()):
            raise ConfigurationError(
                f"{type(self).__name__} has no reward whose weight is not 0, so its score would be constant; name at "
                "least one under `rewards`"
            )
        self.weights = {check_name(name): part.weight for name, part in rewards.items()}
        self.rewards = nn.ModuleList(part.reward for part in rewards.values())
        self.differentiable = all(part.reward.differentiable for part in rewards.values() if part.weight != 0)
        self._caps = {name: part.capped for name, part in rewards.items()}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`; parts of weight 0 are not evaluated."""
        active = [name for name, weight in self.weights.items() if weight != 0]
        return self._total(images, self._scores(images, prompts, active))

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> Scored:
        """The sum `(B,)` and every part `(B,)` by name; the parts of a part are named `part/name`."""
        found = self._scores(images, prompts, self.weights)
        scores: dict[str, Tensor] = {}
        for name, (score, inner) in found.items():
            scores[name] = score
            scores.update({f"{name}/{key}": value for key, value in inner.items()})
        return self._total(images, found), scores

    def components(self) -> dict[str, Reward]:
        """The parts by name."""
        return dict(zip(self.weights, cast(Iterable[Reward], self.rewards), strict=True))

    @property
    def needs_calibration(self) -> bool:
        """Whether a part is."""
        return any(part.needs_calibration for part in self.components().values())

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Hand each part what belongs to its own parts."""
        for name, part in self.components().items():
            head = f"{name}/"
            part.update_statistics(
                {key.removeprefix(head): value for key, value in scores.items() if key.startswith(head)}
            )

    def _scores(self, images: Tensor, prompts: Sequence[str], names: Iterable[str]) -> dict[str, Scored]:
        members = self.components()
        return {name: self._score(name, members[name], images, prompts) for name in names}

    def _score(self, name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scored:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[name] != 0):
            score, inner = reward.breakdown(images, prompts)
        return _checked_scores(name, score, len(images), reward), inner

    def _total(self, images: Tensor, found: Mapping[str, Scored]) -> Tensor:
        total = torch.zeros(len(images), device=images.device)
        for name, (score, _) in found.items():
            if self.weights[name] != 0:
                total = total + self.weights[name] * self._scaled(name, self._caps[name](score))
        return total

    def _scaled(self, name: str, score: Tensor) -> Tensor:
        """A part's score on the scale on which parts are added."""
        return score


class ZScoreSum(WeightedSum):
    """`sum_i weight_i (reward_i - mean_i) / std_i`, with running statistics of each part's own scores in training.

    Parts of different units become comparable, and weights mean what they say. The statistics start with at least 16
    images of the first prompts, change after each batch of training images, never in validation, are the same on every
    process, and are part of the checkpoint. Thresholds are in the part's own units. Before any statistics, mean 0 and
    std 1 are used.

    Args:
        rewards: Parts by name, as in `WeightedSum`.
        memory: The statistics are those of all images while there are fewer than this, and then forget older ones.

    Raises:
        ConfigurationError: As in `WeightedSum`, or the memory is shorter than 2.
    """

    def __init__(self, rewards: dict[str, WeightedReward], memory: int = 4096) -> None:
        super().__init__(rewards)
        if memory < 2:
            raise ConfigurationError(f"memory={memory} holds no standard deviation; write at least 2, better hundreds")
        self.memory = memory
        self.moments = {name: RunningMoments(memory) for name, weight in self.weights.items() if weight != 0}

    @property
    def needs_calibration(self) -> bool:
        """Whether there are no statistics yet."""
        return super().needs_calibration or any(moments.count == 0 for moments in self.moments.values())

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Take scores of training images into the statistics."""
        super().update_statistics(scores)
        for name, moments in self.moments.items():
            moments.update(scores[name])

    def get_extra_state(self) -> dict[str, list[float]]:
        """The statistics, for the state dict."""
        return {name: [moments.count, moments.mean, moments.variance] for name, moments in self.moments.items()}

    def set_extra_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with saved statistics."""
        for name, moments in self.moments.items():
            if name in state:
                moments.count, moments.mean, moments.variance = state[name]

    def _scaled(self, name: str, score: Tensor) -> Tensor:
        return (score - self.moments[name].mean) / self.moments[name].std


class GradientNormSum(WeightedSum):
    """`sum_i weight_i reward_i` whose gradient is `sum_i weight_i c g_i / |g_i|`: every part pulls alike.

    `g_i` is the gradient of a part's own score with respect to one image, and `c` the mean of the parts' norms `|g_i|`
    for this image, so that a sum of one part is that part. A part whose gradient is 0 does not pull. Thresholds act
    after the norms are made equal, so that a part fades out as it reaches its own. The value is the plain weighted sum:
    its gradient is that of no function. Each part's graph is freed before the next part runs.

    Args:
        rewards: Parts by name, as in `WeightedSum`.
    """

    def _scores(self, images: Tensor, prompts: Sequence[str], names: Iterable[str]) -> dict[str, Scored]:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return super()._scores(images, prompts, names)
        x = images if images.dtype == torch.float64 else images.float()
        found: dict[str, Scored] = {}
        gradients: dict[str, Tensor] = {}
        for name in names:
            leaf = x.detach().requires_grad_()
            score, inner = super()._scores(leaf, prompts, [name])[name]
            if self.weights[name] != 0:
                gradients[name] = image_gradient(score, leaf)
            found[name] = score.detach(), {key: value.detach() for key, value in inner.items()}
        norms = {name: gradient.flatten(1).norm(dim=1) for name, gradient in gradients.items()}
        common = torch.stack(list(norms.values())).mean(0)
        for name, gradient in gradients.items():
            factor = torch.where(norms[name] > 0, common / norms[name], 0.0)
            slope = factor.view(-1, 1, 1, 1) * gradient
            # Value 0, gradient `slope`: by it the score keeps its value and is given this gradient.
            found[name] = found[name][0] + (slope * (x - x.detach())).flatten(1).sum(1), found[name][1]
        return found


class RunningMoments:
    """Mean and standard deviation of numbers that come in batches.

    The first `memory` numbers weigh alike (the update is Chan's, exact); from then on a batch of `b` weighs
    `b / (memory + b)`, so that older ones are forgotten.

    Args:
        memory: How many numbers are remembered.

    Attributes:
        count: How many numbers the statistics stand for, at most `memory`.
        mean: Of them.
        variance: Of them, divided by the count.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.count, self.mean, self.variance = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 1 where the numbers do not differ, up to rounding."""
        std = self.variance**0.5
        return std if std > 1e-6 * abs(self.mean) else 1.0

    def update(self, values: Tensor) -> None:
        """Take in numbers of any shape, at least one."""
        values = values.detach().double()
        size, mean, variance = values.numel(), float(values.mean()), float(values.var(correction=0))
        total, shift = self.count + size, mean - self.mean
        self.mean += shift * size / total
        within = self.count * self.variance + size * variance
        self.variance = (within + shift**2 * self.count * size / total) / total
        self.count = min(total, float(self.memory))


def image_gradient(scores: Tensor, images: Tensor) -> Tensor:
    """Gradient `(B, 3, H, W)` of each image's own score; 0 where there is none. The graph is freed."""
    if not scores.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient


def _checked_scores(name: str, scores: Tensor, batch_size: int, reward: nn.Module) -> Tensor:
    try:
        return check_scores(scores, batch_size, reward)
    except ConfigurationError as error:
        raise ConfigurationError(f"reward {name!r}: {error}") from error
