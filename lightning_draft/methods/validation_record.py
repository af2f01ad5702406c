"""What a validation has measured: paired scores of the fine-tuned and the base model, and the first images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_IMAGES = 4


@dataclass(frozen=True)
class Change:
    """The mean score of the validation images before and after fine-tuning, on the same prompts and noise.

    Args:
        before: Mean score of the base model.
        after: Mean score of the fine-tuned model.
        error: Standard error of the mean difference of pairs; NaN for a single image.
        count: Number of images.
    """

    before: float
    after: float
    error: float
    count: int


class ValidationRecord:
    """Sums of the scores of one validation, and its first images; it holds the first data loader only.

    Args:
        prompts: Prompts of the first batch.
        tuned: The fine-tuned model's images of it, `(B, 3, H, W)`.
        base: The base model's images of it.

    Attributes:
        prompts: Prompts of the kept images, at most 4.
        images: Kept images `(N, 3, H, W)` in [0, 1], on the CPU, of both models: `base` and `fine-tuned`.
    """

    def __init__(self, prompts: Sequence[str], tuned: Tensor, base: Tensor) -> None:
        self._sums: dict[str, Tensor] = {}
        self.prompts = [str(prompt) for prompt in prompts[:KEPT_IMAGES]]
        self.images = {
            name: x[:KEPT_IMAGES].float().clamp(0, 1).cpu() for name, x in (("base", base), ("fine-tuned", tuned))
        }

    def add(self, scores: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Add the scores `(B,)` of a batch by name."""
        for name, after in scores.items():
            before, after = base[name].double(), after.double()
            gain = after - before
            sums = torch.stack([torch.ones_like(gain), before, after, gain, gain.square()]).sum(1).cpu()
            self._sums[name] = self._sums.get(name, 0) + sums

    def changes(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Change]:
        """Return the change of each score by name.

        Args:
            reduce: Sums a tensor over the processes.
        """
        return {name: _change(reduce(sums).cpu()) for name, sums in self._sums.items()}


def _change(sums: Tensor) -> Change:
    count, before, after, gain, squares = sums.tolist()
    mean = gain / count
    variance = max(0.0, squares / count - mean**2) * count / (count - 1) if count > 1 else math.nan
    return Change(before / count, after / count, math.sqrt(variance / count), int(count))
