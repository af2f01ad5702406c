"""Rewards meant to be harder to exploit: averaged over augmentations, over several rewards, or relative to other words.

References:
    Shen et al., arXiv:2509.06942 (SRPO), section 3.2: relative rewards from positive and negative control words.
    Coste et al., arXiv:2310.02743: mean, worst case and uncertainty-weighted ensembles of rewards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import at_least, in_range, integer_at_least, one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import Prompt, metadata_of
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.combine import Scored, WeightedReward, WeightedSum
from lightning_draft.rewards.precision import full_precision
from lightning_draft.rewards.samples import Samples
from lightning_draft.seeds import check_seed

_SMOOTHING = 1e-6


class WrappedReward(Reward):
    """A reward that is computed from one other reward; running statistics are those of the other reward.

    Args:
        reward: The other reward, of images.

    Raises:
        ConfigurationError: The other reward scores latents.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        if reward.uses_latents:
            raise ConfigurationError(
                f"{type(self).__name__} needs a reward of images, and reward={type(reward).__name__} scores latents; "
                "choose a reward of images, such as CLIPScore"
            )
        self.reward = reward
        self.differentiable = reward.differentiable

    @property
    def needs_calibration(self) -> bool:
        """Whether the wrapped reward needs calibration."""
        return self.reward.needs_calibration

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Update the running statistics of the wrapped reward."""
        self.reward.update_statistics(scores)

    def _reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)


@dataclass(frozen=True)
class Augmentation:
    """One random change of an image `(3, H, W)`; lengths are fractions of the image's sides.

    Args:
        scale: Side of the window that is cropped and resized to the whole image, in (0, 1].
        offset: Displacement of the window's center to the right and downwards.
        gain: Factor of each color channel, `(3,)`.
        noise: Standard deviation of the added Gaussian noise.
        seed: Seed of the noise.
    """

    scale: float
    offset: tuple[float, float]
    gain: tuple[float, float, float]
    noise: float
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        """Apply the change to all images `(B, 3, H, W)`, with bilinear interpolation and mirrored borders."""
        if self.scale != 1 or self.offset != (0.0, 0.0):
            right, down = (2 * length for length in self.offset)
            matrix = images.new_tensor([[self.scale, 0.0, right], [0.0, self.scale, down]]).expand(len(images), 2, 3)
            grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        images = images * images.new_tensor(self.gain).view(3, 1, 1)
        if self.noise == 0:
            return images
        generator = torch.Generator().manual_seed(self.seed)
        return images + self.noise * torch.randn(images.shape[1:], generator=generator).to(images)


class Augmented(WrappedReward):
    """`(1 / K) sum_k reward(A_k(image), prompt)` over K random augmentations `A_k`.

    Averaging removes the effect of details that raise the score only at exact pixel positions. The range is that of the
    reward, and the cost is K times the reward's cost.

    Args:
        reward: The reward to average.
        samples: Number K of augmentations.
        crop: Largest fraction of the sides that is cropped away, in [0, 0.9]; the rest is resized to the whole image.
        shift: Largest shift, as a fraction of the sides, in [0, 0.5].
        tint: Largest relative change of each color channel, in [0, 1].
        noise: Standard deviation of added Gaussian noise, in units of [0, 1] pixels.
        seed: Seed of the augmentations, which are then the same at every call. None samples new augmentations at each
            training step from torch's global generator; in evaluation, and when existing images are scored, they are
            the same at each call.

    Raises:
        ConfigurationError: A number is outside its range, or all of them are 0.
    """

    def __init__(
        self,
        reward: Reward,
        samples: int = 4,
        crop: float = 0.1,
        shift: float = 0.05,
        tint: float = 0.1,
        noise: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(reward)
        self.samples = integer_at_least("samples", samples, 1)
        self.crop = in_range("crop", crop, 0.0, 0.9)
        self.shift = in_range("shift", shift, 0.0, 0.5)
        self.tint = in_range("tint", tint, 0.0, 1.0)
        self.noise = at_least("noise", noise, 0.0)
        self.seed = None if seed is None else check_seed(seed)
        if not (crop or shift or tint or noise):
            raise ConfigurationError("crop, shift, tint and noise are 0: nothing is augmented; write crop=0.1")

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        with full_precision(images) as x:
            changed = [augmentation(x) for augmentation in self.augmentations()]
        return torch.stack([self._reward(version, prompts) for version in changed]).mean(0)

    def augmentations(self) -> list[Augmentation]:
        """Sample the augmentations of one call."""
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        return [self._augmentation(generator) for _ in range(self.samples)]

    def _augmentation(self, generator: torch.Generator) -> Augmentation:
        size, x, y, right, down, *gain = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        cut = self.crop * size
        offset = [cut * (a - 0.5) + self.shift * (2 * b - 1) for a, b in ((x, right), (y, down))]
        red, green, blue = (1 + self.tint * (2 * value - 1) for value in gain)
        seed = int(torch.randint(2**31, (), generator=generator))
        return Augmentation(1 - cut, (offset[0], offset[1]), (red, green, blue), self.noise, seed)


class Ensemble(WeightedSum):
    """The mean, the minimum, or the mean minus a multiple of the standard deviation of several rewards.

    With scores `r_i`: `mean_i r_i`, `min_i r_i`, or `mean_i r_i - coefficient sqrt(mean_i (r_i - mean r)^2)`. The
    minimum and `mean_minus_std` give a low score to images on which the rewards disagree. The rewards must have the
    same unit, such as one model trained with several seeds; divide others by their standard deviation first.

    Args:
        rewards: Rewards by name; names become log keys.
        how: `mean`, `min` or `mean_minus_std`.
        coefficient: Factor of the standard deviation in `mean_minus_std`, at least 0.

    Raises:
        ConfigurationError: There are fewer than two rewards, or an argument is not valid.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        how: Literal["mean", "min", "mean_minus_std"] = "mean_minus_std",
        coefficient: float = 1.0,
    ) -> None:
        if len(rewards) < 2:
            raise ConfigurationError(f"Ensemble has {len(rewards)} rewards; name at least two under `rewards`")
        super().__init__({name: WeightedReward(reward) for name, reward in rewards.items()})
        self.how = one_of("how", how, ("mean", "min", "mean_minus_std"))
        self.coefficient = at_least("coefficient", coefficient, 0.0)

    def _total(self, samples: Samples, found: Mapping[str, Scored]) -> Tensor:
        scores = torch.stack([score for score, _ in found.values()])
        if self.how == "min":
            return scores.amin(0)
        mean = scores.mean(0)
        if self.how == "mean":
            return mean
        # Smoothed, because the square root has no finite gradient if all rewards agree.
        std = (scores.var(0, correction=0) + _SMOOTHING**2).sqrt() - _SMOOTHING
        return mean - self.coefficient * std


class Relative(WrappedReward):
    """`(1 + k) reward(image, positive + prompt) - reward(image, negative + prompt)`, the relative reward of SRPO.

    The part of the score that does not depend on the text cancels. With k = 0 the range is twice as wide as that of the
    reward.

    Args:
        reward: A reward that depends on the prompt, such as `HPSv2` or `CLIPScore`.
        positive: Words that describe what is wanted, written before the prompt; may be empty.
        negative: Words that describe what is not wanted, written before the prompt; may be empty.
        k: Additional weight of the positive text, at least 0.

    Raises:
        ConfigurationError: The texts are equal, or k is negative.
    """

    def __init__(self, reward: Reward, positive: str, negative: str, k: float = 0.0) -> None:
        super().__init__(reward)
        if positive.strip() == negative.strip():
            raise ConfigurationError(f"positive and negative are both {positive!r}; write two different texts")
        self.positive = positive
        self.negative = negative
        self.k = at_least("k", k, 0.0)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        positive, negative = (
            self._reward(images, [_prefixed(text, prompt) for prompt in prompts])
            for text in (self.positive, self.negative)
        )
        return (1 + self.k) * positive - negative


def _prefixed(text: str, prompt: str) -> Prompt:
    return Prompt(f"{text} {prompt}".strip(), metadata_of(prompt))
