"""Advantages that favor samples which differ from the others of their prompt.

References:
    He et al., "GARDO: Reinforcing Diffusion Models without Reward Hacking", arXiv:2512.24138, and the authors' code.
"""

import torch
from torch import Tensor

from lightning_draft.advantages import ImageAdvantages, centered
from lightning_draft.metrics import pairwise_distances
from lightning_draft.rewards.clip_encoder import ImageEncoder


class DiversityAware(ImageAdvantages):
    """GARDO: `A_i = (r_i - mean(r)) d_i / mean(d)` if `r_i > mean(r)`, else `r_i - mean(r)`, within each prompt.

    `d_i` is the distance to the most similar other sample of the prompt. Good samples that repeat another one then
    count less than good samples that are alone, and bad samples count equally.

    Args:
        pretrained: A CLIP, whose features are compared, with the distance `1 - cos`: folder, hub id, or `emoji64-clip`.
            By default the pixels are compared, with the root mean square difference.

    Raises:
        ConfigurationError: The CLIP is missing, incomplete, or not a CLIP.
    """

    def __init__(self, pretrained: str | None = None) -> None:
        self.pretrained = pretrained
        self.encoder = None if pretrained is None else ImageEncoder.load(pretrained)

    def features(self, images: Tensor) -> Tensor:
        """Return the images, or their features `(B, D)`."""
        return images if self.encoder is None else self.encoder.to(images.device).images(images)

    def from_features(self, rewards: Tensor, features: Tensor, group: int) -> Tensor:
        """Compare the features of each prompt."""
        distances = torch.stack([_nearest(some) for some in features.view(-1, group, *features.shape[1:])]).to(rewards)
        mean = distances.mean(1, keepdim=True)
        factors = torch.where(mean > 0, distances / mean, 1.0)
        values = centered(rewards, group)
        return torch.where(values > 0, values * factors, values).flatten()


def _nearest(features: Tensor) -> Tensor:
    """Return the distance of each of `(K, ...)` to its nearest neighbor, `(K,)`."""
    distances = pairwise_distances(features)
    itself = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    return distances.masked_fill(itself, torch.inf).amin(1).clamp(min=0)
