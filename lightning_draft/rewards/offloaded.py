"""A reward whose weights leave the GPU while it does not score."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples, Scorable


class Offloaded(Reward):
    """The score of another reward, whose weights are on the CPU except while it scores.

    It is for evaluation rewards, which training steps do not call, and for the reward of policy gradients. It has no
    gradient, because the backward pass would need the weights too. The weights are moved for each batch of images, and
    features of prompts that the other reward has cached are computed again.

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

    def unregistered_rewards(self) -> Mapping[str, Reward]:
        """Return the other reward."""
        return {"reward": self.reward}

    @torch.no_grad()
    def forward(self, samples: Samples, prompts: Sequence[str]) -> Tensor:  # type: ignore[override]
        """Compute the scores `(B,)` of the other reward."""
        with self._weights_on(samples.device):
            return self.reward(samples, prompts)

    @torch.no_grad()
    def breakdown(self, samples: Scorable, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the score `(B,)` and the components of the other reward."""
        samples = self.inputs(samples)
        with self._weights_on(samples.device):
            return self.reward.breakdown(samples, prompts)

    @contextmanager
    def _weights_on(self, device: torch.device) -> Iterator[None]:
        """Move the weights to a device within this context, and to the CPU after it."""
        self.reward.to(device)
        try:
            yield
        finally:
            self.reward.to("cpu")
