"""Rewards from object detectors: an object is present, is absent, or occurs a given number of times.

Each of a detector's Q boxes contains the object with probability `p = sigmoid(l)`. The differentiable rewards use the
logits `l`, because post-processing drops boxes below a threshold together with their gradient. `DetectedCount` counts
the boxes after post-processing.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import finite, is_finite
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.detector import open_detector
from lightning_draft.rewards.precision import Precision
from lightning_draft.rewards.targets import target_values

QUERY = "a photo of a {}"


class ObjectPresent(Reward):
    """Log-probability that at least one box contains the object, `log(1 - prod(1 - sigmoid(l)))`, at most 0.

    RT-DETR and related models, and Deformable DETR with box refinement, detach their box proposals inside the network,
    so that a part of the gradient is missing; for other detectors it is complete.

    Args:
        pretrained: Folder or hub id of an OWL-ViT or OWLv2, which take text queries, or of a detector of the DETR
            family (YOLOS, RT-DETR, DETR, ...), which has fixed labels.
        object: The object to detect; by default each prompt's metadata `object`.
        query: Text query of OWL-ViT and OWLv2; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The detector cannot be read, or has no such label.
    """

    def __init__(
        self, pretrained: str, object: str | None = None, query: str = QUERY, dtype: Precision = "float32"
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.detector = open_detector(pretrained, query, dtype)
        self.object = object
        if object is not None:
            self.detector.check(object)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        return self.score(self.detector(images, self.objects(prompts)), prompts)

    def objects(self, prompts: Sequence[str]) -> list[str]:
        """Return the object of each prompt."""
        return target_values(prompts, "object", self.object, type(self).__name__)

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Map logits `(B, Q)` to scores `(B,)`."""
        return log_probability_any(logits)


class ObjectAbsent(ObjectPresent):
    """Log-probability that no box contains the object, `-sum softplus(l)`, at most 0.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: Object that must be absent; by default each prompt's metadata `object`.
        query: Text query of OWL-ViT and OWLv2; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The detector cannot be read, or has no such label.
    """

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Map logits `(B, Q)` to scores `(B,)`."""
        return -F.softplus(logits).sum(-1)


class ObjectCount(ObjectPresent):
    """`-(soft count - count)^2`, at most 0; the soft count is `sum sigmoid((l - logit(threshold)) / temperature)`.

    With the default threshold and temperature the soft count is the expected number of boxes, `sum sigmoid(l)`. OWL has
    hundreds of background boxes whose small probabilities add up: a threshold of 0.1 and a temperature of about 0.2
    exclude them. As the temperature goes to 0, the soft count becomes the number that post-processing counts.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: What to count; by default each prompt's metadata `object`.
        count: Number to reach; by default each prompt's metadata `count`.
        threshold: Probability at which a box counts as one half, between 0 and 1.
        temperature: Width of the sigmoid in units of the logit, above 0.
        query: Text query of OWL-ViT and OWLv2; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The detector cannot be read, has no such label, or a number is out of its range.
    """

    def __init__(
        self,
        pretrained: str,
        object: str | None = None,
        count: float | None = None,
        threshold: float = 0.5,
        temperature: float = 1.0,
        query: str = QUERY,
        dtype: Precision = "float32",
    ) -> None:
        if not is_finite(temperature) or temperature <= 0:
            raise ConfigurationError(f"temperature={temperature!r} must be positive; write 1.0, the default")
        check_threshold(threshold)
        check_count(count)
        super().__init__(pretrained, object, query, dtype)
        self.count = count
        self.threshold = threshold
        self.temperature = temperature

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Map logits `(B, Q)` to scores `(B,)`."""
        middle = torch.special.logit(logits.new_tensor(self.threshold))
        found: Tensor = ((logits - middle) / self.temperature).sigmoid().sum(-1)
        return -((found - target_counts(prompts, self.count, type(self).__name__).to(found)) ** 2)


class DetectedCount(Reward):
    """Number of boxes that remain after the detector's post-processing. Black box.

    Images are rounded to 256 levels first, as in a saved image.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: What to count; by default each prompt's metadata `object`.
        score: `number`: the number of boxes, at least 0, for evaluation. `error`: `-(number - count)^2`, at most 0, for
            training with policy gradients.
        count: Number to reach with `error`; by default each prompt's metadata `count`.
        threshold: Score above which a box counts; by default 0.1 for OWL-ViT and OWLv2 and 0.5 for the others, as in
            transformers.
        query: Text query of OWL-ViT and OWLv2; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The detector cannot be read, has no such label, or an option is not known.
    """

    differentiable = False

    def __init__(
        self,
        pretrained: str,
        object: str | None = None,
        score: Literal["number", "error"] = "number",
        count: float | None = None,
        threshold: float | None = None,
        query: str = QUERY,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        if score not in ("number", "error"):
            raise ConfigurationError(f"score={score!r} is not known; write number or error")
        if threshold is not None:
            check_threshold(threshold)
        check_count(count)
        self.pretrained = pretrained
        self.detector = open_detector(pretrained, query, dtype)
        if object is not None:
            self.detector.check(object)
        self.object = object
        self.score = score
        self.count = count
        self.threshold = self.detector.threshold if threshold is None else threshold

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        objects = target_values(prompts, "object", self.object, type(self).__name__)
        rounded = images.float().clamp(0, 1).mul(255).round() / 255
        found = self.detector.count(rounded, objects, self.threshold)
        if self.score == "number":
            return found
        return -((found - target_counts(prompts, self.count, type(self).__name__).to(found)) ** 2)


def log_probability_any(logits: Tensor) -> Tensor:
    """Compute `log(1 - prod(1 - sigmoid(l)))` over the last dimension, accurate for all logits.

    With `s = sum softplus(l)` it is `log(1 - exp(-s))`, evaluated by one of three formulas depending on `s`.
    """
    s = F.softplus(logits).sum(-1)
    likely, rare = s > math.log(2), s < 1e-12
    common = (-torch.expm1(-s.masked_fill(likely | rare, 0.5))).log()
    certain = torch.log1p(-torch.exp(-s.masked_fill(~likely, 1.0)))
    return torch.where(likely, certain, torch.where(rare, logits.logsumexp(-1), common))


def target_counts(prompts: Sequence[str], own: float | None, reward: str) -> Tensor:
    """Return the target number of objects of each image, float64 `(B,)`.

    Raises:
        ConfigurationError: The count of a prompt is missing or is not a number.
    """
    found = target_values(prompts, "count", own, reward)
    try:
        return torch.tensor([float(number) for number in found], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the metadata 'count' of the prompts must be numbers, and one of them is not: {error}"
        ) from error


def check_count(count: float | None) -> None:
    """Check that a number of objects, if it is given, is a number.

    Raises:
        ConfigurationError: It is none.
    """
    if count is not None:
        finite("count", count, "write for example 2")


def check_threshold(threshold: float) -> None:
    """Check that a threshold is above 0 and below 1.

    Raises:
        ConfigurationError: It is outside this range.
    """
    if not is_finite(threshold) or not 0 < threshold < 1:
        raise ConfigurationError(f"threshold={threshold!r} must be a probability above 0 and below 1; write 0.5")
