"""The interface of rewards, and prompts that carry metadata."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.inputs import check_finite, check_images, check_prompts, check_scores, to_device

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Prompt", "Reward", "check_name", "check_scores"]

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Columns(Mapping[str, Any]):
    """Read-only values by name; rows that have the same names share them to save memory.

    Args:
        names: Names of the columns, the same tuple for all rows.
        values: The row's values in that order.
    """

    __slots__ = ("_names", "_values")

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
        self._names = names
        self._values = values

    def __getitem__(self, name: str) -> Any:
        """Return the value of a column."""
        try:
            return self._values[self._names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._names)

    def __repr__(self) -> str:
        """Show the values as a dictionary does."""
        return repr(dict(self))


class Prompt(str):
    """A prompt: a string that may carry metadata for rewards, such as a class, a count or a target.

    Args:
        text (str): The prompt.
        metadata (Mapping | None): Values by name; copied.
    """

    __slots__ = ("metadata",)

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        """Create the string; `str` is immutable, so `__init__` would be too late."""
        prompt = super().__new__(cls, text)
        if metadata and not isinstance(metadata, Columns):
            metadata = dict(metadata)
        prompt.metadata = metadata or _NO_METADATA
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the metadata when pickled or copied."""
        return type(self), (str(self), dict(self.metadata))


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """Return the metadata of a prompt; a plain string has none."""
    return prompt.metadata if isinstance(prompt, Prompt) else _NO_METADATA


class Reward(nn.Module, ABC):
    """Score images; higher is better.

    A subclass implements only `forward`. Calling a reward checks images and prompts, runs `forward` and
    checks the scores. The module that trains freezes the reward's parameters and puts it into eval mode.

    Attributes:
        differentiable: Whether a gradient flows from the score to the images. Direct methods such as DRaFT need one;
            policy gradients and evaluation accept any reward.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute the scores of a batch.

        Args:
            images: float `(B, 3, H, W)` in about [0, 1]. Values may lie slightly outside, because the output of a
                decoder is not clamped: a clamp has no gradient for pixels outside.
            prompts: `B` prompts; each may be a `Prompt` with metadata.

        Returns:
            Scores `(B,)`, float32; integers and booleans are converted.
        """

    def __call__(self, images: "Tensor | Sequence[Image.Image]", prompts: Sequence[str]) -> Tensor:
        """Check the input, compute the scores with `forward`, and check them.

        Args:
            images: float `(B, 3, H, W)` in about [0, 1], or a list of `B` PIL images of one size.
            prompts: `B` strings.

        Returns:
            Finite scores `(B,)`, float32, or float64 if `forward` returns float64.

        Raises:
            ConfigurationError: Images or prompts have another type or shape, or the scores have.
            NonFiniteScoreError: A score is NaN or infinite and no gradient is computed; the message names the prompts.
                With a gradient such a score becomes NaN with a warning, and the training module handles the step.
        """
        pixels = check_images(images)
        texts = check_prompts(prompts, len(pixels))
        scores: Tensor = super().__call__(pixels, texts)
        scores = to_device(check_scores(scores, len(texts), self), pixels.device, self)
        return check_finite(scores, pixels, texts, self)

    def breakdown(
        self, images: "Tensor | Sequence[Image.Image]", prompts: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the score `(B,)` and the scores of its components by name, each `(B,)`. Training logs them."""
        return self(images, prompts), {}

    @property
    def needs_calibration(self) -> bool:
        """Whether the reward needs the scores of some images (`update_statistics`) before training."""
        return False

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Update running statistics with the scores of training images; by default do nothing.

        The module that trains calls it after each batch, with the same scores on every process. Scoring itself never
        changes a reward. Return the statistics in `get_extra_state`, so that checkpoints contain them.

        Args:
            scores: The components of `breakdown` by name, detached, for the images of all processes.
        """


def check_name(name: str) -> str:
    """Return `name` if it can be part of a log key.

    Raises:
        ConfigurationError: It contains other characters than letters, digits, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigurationError(
            f"{name!r} cannot name a reward: it becomes part of a log key; use letters, digits, _ and -"
        )
    return name
