"""A reward whose weights leave the GPU while it does not score."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples, Scorable


class Offloaded(Reward):
    """The score of another reward, whose weights are on the CPU except while it scores.

    It is for evaluation rewards, which training steps do not call, and for the reward of policy gradients. It has no
    gradient, because the backward pass would need the weights too. The weights are moved for each batch of images.

    Args:
        reward: The other reward.

    Raises:
        ConfigurationError: The other reward has running statistics, which checkpoints must contain.
    """

    differentiable = False

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        if reward.needs_calibration:
            raise ConfigurationError(
                f"reward={type(reward).__name__} has running statistics, which Offloaded does not save; write "
                "Offloaded around its components"
            )
        self._held = (reward.eval().requires_grad_(False),)  # no submodule, or the Trainer would move it
        self.uses_images, self.uses_latents = reward.uses_images, reward.uses_latents

    @property
    def reward(self) -> Reward:
        """The other reward."""
        return self._held[0]

    def inputs(self, samples: Scorable) -> Samples:
        """Return the samples, from which the other reward takes its input."""
        return Samples.of(samples)

    @torch.no_grad()
    def forward(self, samples: Samples, prompts: Sequence[str]) -> Tensor:  # type: ignore[override]
        """Move the weights to the device of the samples, score, and move them back to the CPU."""
        self.reward.to(samples.device)
        try:
            return self.reward(samples, prompts)
        finally:
            self.reward.to("cpu")
