"""Rewards from object detectors: an object is there, is not there, or is there so many times.

Each of a detector's Q boxes holds the object with probability `p = sigmoid(l)`. The differentiable rewards are made of
the logits `l` themselves: post-processing drops what lies below a threshold, and with it the gradient that could raise
it. `DetectedCount` is what post-processing counts.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.detector import open_detector
from lightning_draft.rewards.precision import Precision
from lightning_draft.rewards.targets import target_values

QUERY = "a photo of a {}"


class ObjectPresent(Reward):
    """Log-probability that at least one box holds the object, `log(1 - prod(1 - sigmoid(l)))`, at most 0.

    RT-DETR and its kin, and Deformable DETR where it refines boxes, cut the gradient at their proposals inside the
    network, so that a part of it is missing; with the others it is whole.

    Args:
        pretrained: Folder or hub id of an OWL-ViT or OWLv2, which are asked in words, or of a detector of the DETR
            family (YOLOS, RT-DETR, DETR, ...), which knows its labels.
        object: What to look for; by default each prompt's metadata `object`.
        query: How a detector is asked in words; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: There is no detector, or it does not know the object.
    """

    def __init__(
        self, pretrained: str, object: str | None = None, query: str = QUERY, dtype: Precision = "float32"
    ) -> None:
        super().__init__()
        self.detector = open_detector(pretrained, query, dtype)
        self.object = object
        if object is not None:
            self.detector.check(object)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        return self.score(self.detector(images, self.objects(prompts)), prompts)

    def objects(self, prompts: Sequence[str]) -> list[str]:
        """What to look for in the image of each prompt."""
        return target_values(prompts, "object", self.object, type(self).__name__)

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits `(B, Q)` to `(B,)`."""
        return log_probability_any(logits)


class ObjectAbsent(ObjectPresent):
    """Log-probability that no box holds the object, `-sum softplus(l)`, at most 0.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: What must not be there; by default each prompt's metadata `object`.
        query: How a detector is asked in words; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: There is no detector, or it does not know the object.
    """

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits `(B, Q)` to `(B,)`."""
        return -F.softplus(logits).sum(-1)


class ObjectCount(ObjectPresent):
    """`-(soft count - count)^2`, at most 0; the soft count is `sum sigmoid((l - logit(threshold)) / temperature)`.

    With the default threshold and temperature the soft count is the expected number of boxes, `sum sigmoid(l)`. OWL's
    hundreds of boxes add up in the background: there a threshold of 0.1, its own, and a temperature of 0.2 or so keep
    them out. As the temperature goes to 0, so does the difference from the number that post-processing counts.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: What to count; by default each prompt's metadata `object`.
        count: How many there should be; by default each prompt's metadata `count`.
        threshold: Score at which a box counts half, between 0 and 1.
        temperature: Width of the step in units of the logit, above 0.
        query: How a detector is asked in words; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: There is no detector, it does not know the object, or a number is out of its range.
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
        if temperature <= 0:
            raise ConfigurationError(f"temperature={temperature} must be above 0; 1 is the probability itself")
        check_threshold(threshold)
        super().__init__(pretrained, object, query, dtype)
        self.count = count
        self.threshold = threshold
        self.temperature = temperature

    def score(self, logits: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits `(B, Q)` to `(B,)`."""
        middle = torch.special.logit(logits.new_tensor(self.threshold))
        found = ((logits - middle) / self.temperature).sigmoid().sum(-1)
        return -((found - target_counts(prompts, self.count, type(self).__name__).to(found)) ** 2)


class DetectedCount(Reward):
    """How many boxes the detector's own post-processing keeps; black box.

    Images are rounded to 256 levels first: it is the saved picture that is counted in.

    Args:
        pretrained: Folder or hub id of an OWL-ViT, OWLv2 or detector of the DETR family.
        object: What to count; by default each prompt's metadata `object`.
        score: `number`: the number of boxes, at least 0, for evaluation. `error`: `-(number - count)^2`, at most 0, for
            training with policy gradients.
        count: How many there should be, where the score is `error`; by default each prompt's metadata `count`.
        threshold: Score above which a box counts; by default 0.1 for OWL-ViT and OWLv2 and 0.5 for the others, as in
            transformers.
        query: How a detector is asked in words; `{}` is the object.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: There is no detector, it does not know the object, or an option is not known.
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
        pictures = images.float().clamp(0, 1).mul(255).round() / 255
        found = self.detector.count(pictures, objects, self.threshold)
        if self.score == "number":
            return found
        return -((found - target_counts(prompts, self.count, type(self).__name__).to(found)) ** 2)


def log_probability_any(logits: Tensor) -> Tensor:
    """`log(1 - prod(1 - sigmoid(l)))` over the last dimension, and its gradient, from certainty down to `exp(l)` = 0.

    With `s = sum softplus(l)` it is `log(1 - exp(-s))`, which takes one form for each range of `s`.
    """
    s = F.softplus(logits).sum(-1)
    likely, rare = s > math.log(2), s < 1e-12
    common = (-torch.expm1(-s.masked_fill(likely | rare, 0.5))).log()
    certain = torch.log1p(-torch.exp(-s.masked_fill(~likely, 1.0)))
    return torch.where(likely, certain, torch.where(rare, logits.logsumexp(-1), common))


def target_counts(prompts: Sequence[str], own: float | None, reward: str) -> Tensor:
    """How many objects each image should show, `(B,)` float64.

    Raises:
        ConfigurationError: A prompt's is not a number.
    """
    found = target_values(prompts, "count", own, reward)
    try:
        return torch.tensor([float(number) for number in found], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the metadata 'count' of the prompts must be numbers, and one of them is not: {error}"
        ) from error


def check_threshold(threshold: float) -> None:
    """Check that a threshold lies between 0 and 1.

    Raises:
        ConfigurationError: It does not.
    """
    if not 0 < threshold < 1:
        raise ConfigurationError(f"threshold={threshold} must lie between 0 and 1: it is a probability")
