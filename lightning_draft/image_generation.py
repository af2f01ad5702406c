"""Generate and score images of prompts from fixed noise."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import Sampler
from lightning_draft.seeds import derive_seed, scoring

Score = Callable[[Samples, Sequence[str]], Mapping[str, Tensor]]

Sample = Callable[[SamplingChain, Tensor, Sequence[str]], Tensor]
"""Called with a chain, starting noise `(B, ...)` and `B` prompts; returns clean latents `(B, ...)`."""


@torch.no_grad()
def generate(
    model: PipelineModel,
    sampler: Sampler,
    prompts: Sequence[str],
    seed: int,
    scale: float = 1.0,
    batch_size: int = 8,
    method: Sample | None = None,
) -> Samples:
    """Return `N` latents and images on the CPU, from noise that depends only on the seed.

    Args:
        model: The model.
        sampler: The sampler.
        prompts: `N` prompts.
        seed: Seed of the starting noise and, separately, of all further random numbers.
        scale: Scale of the model's adapters, if it has any.
        batch_size: Number of images generated at a time.
        method: Samples latents from noise; by default the plain chain.

    Raises:
        ConfigurationError: The images are not finite.
    """
    noise = model.noise(len(prompts), torch.Generator().manual_seed(seed))
    method = method or _sample
    with nullcontext() if model.lora is None else model.adapter_scale(scale):
        samples = _generate(model, sampler, prompts, seed, noise, batch_size, method)
    if not samples.content.isfinite().all():
        raise ConfigurationError(
            f"scale={scale:g} gives images with values that are not finite; write a scale such as 1, or dtype float32"
        )
    return samples


@torch.no_grad()
def score_samples(
    score: Score, samples: Samples, prompts: Sequence[str], device: torch.device, batch_size: int = 8
) -> dict[str, Tensor]:
    """Return scores `(N,)` on the CPU by name, of samples with images clamped to [0, 1].

    Args:
        score: Called with samples and their prompts.
        samples: The samples.
        prompts: `N` prompts.
        device: The device of the rewards.
        batch_size: Number of samples scored at a time.
    """
    slices = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    parts = []
    for some in slices:
        with scoring(device):
            parts.append(score(samples[some].clamped().to(device), prompts[some]))
    return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}


def _generate(
    model: PipelineModel,
    sampler: Sampler,
    prompts: Sequence[str],
    seed: int,
    noise: Tensor,
    batch_size: int,
    method: Sample,
) -> Samples:
    parts = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        torch.manual_seed(derive_seed(seed, start))  # else the noise of the steps repeats the starting noise
        chain = SamplingChain(model, sampler, model.encode(some))
        latents = method(chain, noise[start : start + batch_size], some)
        parts.append(Samples.concatenate([Samples(latents, model.decode(latents))]))
    return Samples.concatenate(parts)


def _sample(chain: SamplingChain, noise: Tensor, prompts: Sequence[str]) -> Tensor:
    return chain.advance(chain.start(noise)).x
