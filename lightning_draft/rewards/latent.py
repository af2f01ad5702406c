"""Rewards of the clean latents, which need no decoder in training."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.precision import full_precision
from lightning_draft.rewards.samples import Samples, Scorable
from lightning_draft.rewards.weights import load_state, read_tensors


class LatentReward(Reward):
    """Score clean latents; higher is better.

    A subclass implements only `forward`, which receives latents in place of images. Training on such a reward, or on
    a sum of such rewards, does not decode. Images are still decoded in validation and for sample grids. It can be
    called with `Samples` only, because latents cannot be told from images by their shape.
    """

    uses_images = False
    uses_latents = True

    @abstractmethod
    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute the scores of a batch.

        Args:
            latents: `(B, C, h, w)`, as the sampling chain ends: in the scale of the denoiser and not packed.
            prompts: `B` prompts; each may be a `Prompt` with metadata.

        Returns:
            Scores `(B,)`, float32; integers and booleans are converted.
        """

    def inputs(self, samples: Scorable) -> Tensor:
        """Return the latents.

        Raises:
            ConfigurationError: There are none, because existing images were given.
        """
        latents = samples.latents if isinstance(samples, Samples) else None
        if latents is None:
            raise ConfigurationError(describe_no_latents(self))
        return latents


class LatentNetwork(LatentReward):
    """`network(latents)`: the score of a network that the user has trained on latents of the same autoencoder.

    Args:
        network: Maps latents `(B, C, h, w)` to scores `(B,)` or `(B, 1)`. In a config it is named by its class path.
        weights: A `.safetensors` file, or a pickle of tensors, with its state dict; by default its own values.

    Raises:
        ConfigurationError: The weights cannot be read, or belong to another network.
    """

    def __init__(self, network: nn.Module, weights: str | None = None) -> None:
        super().__init__()
        if weights is not None:
            path = Path(weights).expanduser()
            load_state(network, read_tensors(path), path)
        self.network = network
        self.weights = weights

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, C, h, w)` to `(B,)`."""
        with full_precision(latents) as x:
            scores: Tensor = self.network(x)
        return scores.squeeze(1) if scores.dim() == 2 and scores.shape[1] == 1 else scores


def describe_no_latents(reward: Reward) -> str:
    """Return why a reward of latents cannot score existing images, and what to do."""
    return (
        f"{type(reward).__name__} scores the latents that a diffusion model samples, and existing images have none; "
        "choose a reward of images, such as AestheticScore, or score new samples with lightning-draft sample --reward"
    )
