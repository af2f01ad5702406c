"""Diversity, drift, saturation and set distances against sums over pairs and closed forms."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from lightning_draft.errors import ConfigurationError
from lightning_draft.metrics import (
    frechet_distance,
    image_drift,
    kernel_distance,
    saturated_pixel_fraction,
    within_prompt_diversity,
)
from lightning_draft.rewards import CLIPScore

PROMPTS = ["cat", "dog", "cat", "bird", "dog", "cat"]
PAIRS = {"cat": [(0, 2), (0, 5), (2, 5)], "dog": [(1, 4)]}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_diversity_of_images_is_the_mean_over_pairs_of_each_prompt() -> None:
    images = 0.5 + 0.4 * gaussian(6, 3, 4, 5)
    clamped = images.clamp(0, 1)
    means = [
        sum((clamped[a] - clamped[b]).square().mean().sqrt() for a, b in pairs) / len(pairs) for pairs in PAIRS.values()
    ]
    torch.testing.assert_close(within_prompt_diversity(images, PROMPTS), sum(means).double() / 2)


def test_diversity_of_features_is_one_minus_the_cosine_for_any_length() -> None:
    features = gaussian(6, 7)
    means = [
        sum(1 - F.cosine_similarity(features[a], features[b], 0) for a, b in pairs) / len(pairs)
        for pairs in PAIRS.values()
    ]
    scaled = features * torch.arange(1, 7).unsqueeze(1)
    torch.testing.assert_close(within_prompt_diversity(scaled, PROMPTS), sum(means).double() / 2)


def test_diversity_is_zero_for_equal_and_largest_for_opposite_images() -> None:
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    same = within_prompt_diversity(image.expand(3, -1, -1, -1), ["a"] * 3)
    assert same.item() == pytest.approx(0, abs=1e-6)
    ends = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert within_prompt_diversity(ends, ["a", "a"]).item() == pytest.approx(1)
    assert within_prompt_diversity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), ["a", "a"]).item() == pytest.approx(2)


def test_diversity_needs_two_samples_of_a_prompt() -> None:
    with pytest.raises(ConfigurationError, match="needs two samples or more of one prompt; repeat the prompts"):
        within_prompt_diversity(gaussian(2, 3), ["a", "b"])


def test_saturation_counts_values_at_or_beyond_the_range() -> None:
    images = torch.full((2, 3, 2, 2), 0.5)
    images[0, 0, 0, 0], images[0, 1, 0, 0], images[0, 2, 1, 1] = -0.1, 1.2, 1.0
    expected = torch.tensor([3 / 12, 0.0])
    torch.testing.assert_close(saturated_pixel_fraction(images), expected)
    torch.testing.assert_close(saturated_pixel_fraction(images.clamp(0, 1)), expected)


def test_drift_is_the_root_mean_square_difference_of_clamped_images() -> None:
    base = torch.full((2, 3, 2, 2), 0.5)
    images = base.clone()
    images[0] += 0.3
    images[1, 0, 0, 0] = 7.0
    torch.testing.assert_close(image_drift(images, base), torch.tensor([0.3, 0.5 / 12**0.5]))


def test_the_kernel_distance_is_the_unbiased_estimate() -> None:
    ours, theirs = gaussian(9, 4), 0.5 + gaussian(9, 4, seed=1)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y / 4 + 1) ** 3

    within = sum(
        sum(kernel(a, b) for a, b in itertools.permutations(features, 2)) / (9 * 8) for features in (ours, theirs)
    )
    across = sum(kernel(a, b) for a in ours for b in theirs) / 81
    torch.testing.assert_close(kernel_distance(ours, theirs), within - 2 * across)
    state = torch.get_rng_state()
    assert kernel_distance(ours, theirs[:5]) == kernel_distance(ours, theirs[:5])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_kernel_distance_of_one_distribution_is_around_zero() -> None:
    alike = torch.stack(
        [kernel_distance(gaussian(40, 4, seed=2 * i), gaussian(40, 4, seed=2 * i + 1)) for i in range(30)]
    )
    apart = kernel_distance(gaussian(40, 4), 1 + gaussian(40, 4, seed=1))
    assert abs(alike.mean()) < 3 * alike.std() / 30**0.5
    assert (alike < 0).any()
    assert apart > 5 * alike.std()


def test_frechet_distance_of_gaussians_equals_the_closed_form() -> None:
    """For commuting covariances: `|mu - nu|^2 + sum (sqrt(a_i) - sqrt(b_i))^2`, with the moments of the sets."""
    base = gaussian(50, 3).double()
    base = torch.linalg.qr(base - base.mean(0))[0] * 7  # mean 0, covariance the identity
    scales, shift = torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    distance = frechet_distance(base, base * scales + shift)
    assert distance.item() == pytest.approx(((scales - 1) ** 2 + shift**2).sum().item(), rel=1e-6)


class AsBefore(torch.nn.Module):
    """A CLIP of transformers 5 that returns features in the format of transformers 4, as torchmetrics expects."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.clip.get_image_features(pixels)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = self.clip.get_text_features(tokens, mask)
        return getattr(found, "pooler_output", found)


def test_clip_score_equals_that_of_torchmetrics(tiny_clip: Path) -> None:
    """torchmetrics' loading of a CLIP fails with transformers 5; its score is 100 times the cosine."""
    images = (255 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).byte()
    prompts = ["red", "cat", "a dog", "red cat"]
    clip, processor = AsBefore(CLIPModel.from_pretrained(tiny_clip)), CLIPProcessor.from_pretrained(tiny_clip)
    ours = CLIPScore(str(tiny_clip))(images / 255, prompts)
    for some in (slice(0, 1), slice(0, 4)):
        theirs = clip_score(list(images[some]), prompts[some], lambda: (clip, processor))
        torch.testing.assert_close(100 * ours[some].mean().clamp(min=0), theirs, rtol=1e-4, atol=1e-3)


def test_sets_of_images_are_compared_by_clip_features(tiny_clip: Path) -> None:
    """By both distances, a set is closer to noisy copies of itself than to another set."""
    generator = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, 24, 3, 16, 16, generator=generator) * torch.tensor([1.0, 0.4]).view(2, 1, 1, 1, 1)
    copies = images + 0.02 * torch.randn(images.shape, generator=generator)
    encoder = CLIPScore(str(tiny_clip)).encoder
    ours, near, far = (encoder.images(batch) for batch in (images, copies, others))
    for distance in (kernel_distance, frechet_distance):
        assert distance(ours, near) < 0.2 * distance(ours, far)
