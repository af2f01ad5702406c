"""The interface of rewards."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.inputs import check_finite, check_images, check_prompts, check_scores, to_device
from lightning_draft.rewards.samples import Samples, Scorable

__all__ = ["Reward", "check_name", "check_scores"]


class Reward(nn.Module, ABC):
    """Score images; higher is better.

    A subclass implements only `forward`. Calling a reward checks images and prompts, runs `forward` and
    checks the scores. The module that trains freezes the reward's parameters and puts it into eval mode.

    Attributes:
        differentiable: Whether a gradient flows from the score to the images. Direct methods such as DRaFT need one;
            policy gradients and evaluation accept any reward.
        uses_images: Whether it scores decoded images; training decodes only if it does.
        uses_latents: Whether it scores clean latents, as a `LatentReward` does; existing images have none.
    """

    differentiable: bool = True
    uses_images: bool = True
    uses_latents: bool = False

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

    def inputs(self, samples: Scorable) -> Any:
        """Return what `forward` receives: the images.

        Raises:
            ConfigurationError: They have another type, shape or range.
        """
        return check_images(samples.images if isinstance(samples, Samples) else samples)

    def __call__(self, samples: Scorable, prompts: Sequence[str]) -> Tensor:
        """Check the input, compute the scores with `forward`, and check them.

        Args:
            samples: float images `(B, 3, H, W)` in about [0, 1], a list of `B` PIL images of one size, or `Samples`.
            prompts: `B` strings.

        Returns:
            Finite scores `(B,)`, float32, or float64 if `forward` returns float64.

        Raises:
            ConfigurationError: Images or prompts have another type or shape, or the scores have.
            NonFiniteScoreError: A score is NaN or infinite and no gradient is computed; the message names the prompts.
                With a gradient such a score becomes NaN with a warning, and the training module handles the step.
        """
        inputs = self.inputs(samples)
        texts = check_prompts(prompts, len(inputs))
        scores: Tensor = super().__call__(inputs, texts)
        scores = to_device(check_scores(scores, len(texts), self), inputs.device, self)
        return check_finite(scores, inputs.content if isinstance(inputs, Samples) else inputs, texts, self)

    def breakdown(self, samples: Scorable, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the score `(B,)` and the scores of its components by name, each `(B,)`. Training logs them."""
        return self(samples, prompts), {}

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

    def unregistered_rewards(self) -> Mapping[str, "Reward"]:
        """Return the rewards by name that it is computed from and that are not its submodules; by default none."""
        return {}

    def nested_rewards(self) -> Iterator["Reward"]:
        """Yield this reward and all rewards that it is computed from."""
        for module in self.modules():
            if isinstance(module, Reward):
                yield module
                for other in module.unregistered_rewards().values():
                    yield from other.nested_rewards()

    def data_version(self) -> str:
        """Return a hash of the files that scores depend on and that may change while they are used; empty for none."""
        return ""

    def usage(self) -> Mapping[str, float]:
        """Return what scoring has used since the process started, such as requests and tokens; by default nothing.

        `CostMonitor` logs each number as `usage/<name>`.
        """
        return {}


def check_name(name: str) -> str:
    """Return `name` if it can be part of a log key.

    Raises:
        ConfigurationError: It contains other characters than letters, digits, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigurationError(
            f"{name!r} cannot be the name of a reward, because names become parts of log keys; "
            "use letters, digits, _ and -"
        )
    return name
