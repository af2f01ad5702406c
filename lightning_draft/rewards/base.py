"""What a reward is."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError


class Prompt(str):
    """A prompt: a string that may carry metadata a reward can read (a class, a count, a target).

    Args:
        text: The prompt.
        metadata: Anything that belongs to it.
    """

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        """Strings are made in `__new__`."""
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]
        """Keep the metadata when pickled or copied."""
        return str(self), self.metadata


class Reward(nn.Module, ABC):
    """Scores images; higher is better.

    A subclass implements `forward` and nothing else. Parameters, if there are any, are frozen and in eval mode by the
    module that uses the reward.

    Attributes:
        differentiable: Whether a gradient flows from the score to the images. Direct methods refuse rewards without.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score a batch.

        Args:
            images: float `(B, 3, H, W)`, in [0, 1] by convention and possibly slightly outside: a decoder's output is
                not clamped, because a clamp kills the gradient of saturated pixels.
            prompts: `B` prompts; each may be a `Prompt` with metadata.

        Returns:
            Scores `(B,)`, float32.
        """

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score `(B,)` and its parts by name, each `(B,)`; parts are what a run logs beside the total."""
        return self(images, prompts), {}

    @property
    def needs_calibration(self) -> bool:
        """Whether the reward wants scores of some images (`update_statistics`) before it is trained on."""
        return False

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Learn from scores of training images, such as running statistics; by default nothing.

        The module that trains calls it after each batch, with the same scores on every process; scoring itself never
        changes a reward. What is learnt belongs into `get_extra_state`, which checkpoints hold.

        Args:
            scores: The parts of `breakdown` by name, of the images of all processes, detached.
        """


def check_name(name: str) -> str:
    """Return `name` if it can name a reward.

    Raises:
        ConfigurationError: It cannot be part of a log key.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigurationError(
            f"{name!r} cannot name a reward: it becomes part of a log key; use letters, digits, _ and -"
        )
    return name


def check_scores(scores: Tensor, batch_size: int, reward: nn.Module) -> Tensor:
    """Return `scores` if they are a tensor of shape `(batch_size,)`.

    Raises:
        ConfigurationError: They are not; the message names the reward.
    """
    if not isinstance(scores, Tensor):
        raise ConfigurationError(
            f"{type(reward).__name__}.forward returned a {type(scores).__name__} for {batch_size} images; return a "
            f"tensor of shape ({batch_size},), such as torch.stack of tensors"
        )
    if scores.shape != (batch_size,):
        raise ConfigurationError(
            f"{type(reward).__name__}.forward returned shape {tuple(scores.shape)} for {batch_size} images; "
            f"return one score an image, shape ({batch_size},)"
        )
    return scores
