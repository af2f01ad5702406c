"""Image metrics besides the mean reward: diversity, drift, saturated pixels, and distances between sets of images.

Lightning's `self.log` computes means of scores and reduces them over processes; torchmetrics computes pairwise and set
distances. Its Inception features need weights that are not shipped, so sets are compared by features of any CLIP, which
agree better with human judgment (Jayasumana et al.).

References:
    Binkowski et al., "Demystifying MMD GANs", arXiv:1801.01401 (the kernel distance, KID).
    Heusel et al., arXiv:1706.08500 (the Frechet distance, FID). Jayasumana et al., arXiv:2401.09603 (CLIP features).
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional import pairwise_cosine_similarity, pairwise_euclidean_distance
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_draft.errors import ConfigurationError
from lightning_draft.seeds import seeded


def within_prompt_diversity(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the mean over prompts of the mean distance between two samples of the prompt, scalar; 0 is mode collapse.

    Args:
        samples: Images `(N, 3, H, W)`, clamped to [0, 1]; their distance is the root mean square difference of pixels,
            in [0, 1]. Or features `(N, D)`, such as those of `CLIPEncoder.images`; their distance is `1 - cos`, in [0,
            2].
        prompts: `N` prompts; those with a single sample are ignored.

    Raises:
        ConfigurationError: No prompt has two samples.
    """
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(str(prompt), []).append(place)
    several = [places for places in groups.values() if len(places) > 1]
    if not several:
        raise ConfigurationError("diversity needs two samples or more of one prompt; repeat the prompts")
    return torch.stack([_mean_pair(pairwise_distances(samples[places])) for places in several]).mean()


def pairwise_distances(samples: Tensor) -> Tensor:
    """Return the distances of all pairs of images `(N, 3, H, W)` or features `(N, D)`, `(N, N)`, float64, on the CPU.

    They are the root mean square difference of pixels, clamped to [0, 1], and `1 - cos`.
    """
    distances = _image_distances if samples.dim() == 4 else _cosine_distances
    return distances(samples.float().cpu())  # some accelerators have no float64


def saturated_pixel_fraction(images: Tensor) -> Tensor:
    """Return the fraction of values that are at most 0 or at least 1, `(B,)` in [0, 1].

    Clamping does not change it. White backgrounds count as saturated, so compare it with the base model's.

    Args:
        images: `(B, 3, H, W)`, in [0, 1] by convention.
    """
    return ((images <= 0) | (images >= 1)).flatten(1).float().mean(1)


def image_drift(images: Tensor, base: Tensor) -> Tensor:
    """Return the root mean square pixel difference of two models' images from the same noise, `(B,)` in [0, 1].

    Args:
        images: `(B, 3, H, W)`, clamped to [0, 1].
        base: Images of the base model for the same prompts and noise.
    """
    return (images.float().clamp(0, 1) - base.float().clamp(0, 1)).square().flatten(1).mean(1).sqrt()


def kernel_distance(features: Tensor, others: Tensor) -> Tensor:
    """Return KID's squared maximum mean discrepancy with the kernel `(x.y / D + 1)^3`, scalar.

    Args:
        features: `(N, D)`, at least 2; if `N` and `M` differ, the result is averaged over subsets of the smaller size.
        others: `(M, D)`.
    """
    size = min(len(features), len(others))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*save all extracted features in buffer.*")
        metric = KernelInceptionDistance(
            _Features(features), subsets=1 if len(features) == len(others) else 100, subset_size=size
        )
    metric.update(features, real=True)
    metric.update(others.to(features), real=False)
    # torchmetrics chooses the subsets with the global generator.
    with seeded(0, torch.device("cpu")):
        return metric.compute()[0]


def frechet_distance(features: Tensor, others: Tensor) -> Tensor:
    """Return FID's squared Frechet distance between Gaussians fitted to the sets, scalar, at least 0.

    Args:
        features: `(N, D)`, at least 2.
        others: `(M, D)`, at least 2.
    """
    metric = FrechetInceptionDistance(_Features(features)).to(features.device)
    metric.update(features, real=True)
    metric.update(others.to(features), real=False)
    return metric.compute()


class _Features(nn.Identity):
    """Identity, because the input of torchmetrics already consists of features."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def _image_distances(images: Tensor) -> Tensor:
    pixels = images.clamp(0, 1).flatten(1).double()
    distances: Tensor = pairwise_euclidean_distance(pixels) / pixels.shape[1] ** 0.5
    return distances


def _cosine_distances(features: Tensor) -> Tensor:
    return 1 - pairwise_cosine_similarity(features.double())


def _mean_pair(distances: Tensor) -> Tensor:
    """Return the mean of the off-diagonal elements of `(n, n)`."""
    count = len(distances)
    return (distances.sum() - distances.diagonal().sum()) / (count * (count - 1))
