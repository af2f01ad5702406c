"""Images, scores and costs of several inference-time methods from the same prompts and noise."""

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.files import atomic_path
from lightning_draft.guide.latent_score import latent_score
from lightning_draft.guide.methods import Method
from lightning_draft.image_generation import Sample, Score, generate, score_samples
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.pass_counter import PassCounter
from lightning_draft.recompute import Recompute
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import Sampler


@dataclass(frozen=True)
class GuidedImages:
    """The images of one method.

    Args:
        samples: `N` latents and images, on the CPU.
        scores: By name of the reward, `(N,)`.
        forwards: Forward passes of the denoiser for each image; a call with both branches of classifier-free guidance
            is two.
        backwards: Backward passes of the denoiser for each image.
        seconds: Seconds for all images, without scoring.
    """

    samples: Samples
    scores: Mapping[str, Tensor]
    forwards: float
    backwards: float
    seconds: float

    def gain(self, base: "GuidedImages", reward: str) -> tuple[float, float | None]:
        """Return the mean difference of a reward from the base's images, and its standard error, None for one image."""
        differences = (self.scores[reward] - base.scores[reward]).double()
        count = len(differences)
        return float(differences.mean()), float(differences.std() / count**0.5) if count > 1 else None


def run_method(
    model: PipelineModel,
    sampler: Sampler,
    prompts: Sequence[str],
    score: Score,
    method: Sample | None = None,
    *,
    scale: float = 0.0,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
) -> GuidedImages:
    """Generate and score images, and count the cost of generating them.

    Args:
        model: The model.
        sampler: The sampler.
        prompts: Prompts.
        score: Called with `B` samples, whose images are in [0, 1], and `B` prompts; returns scores `(B,)` by name.
        method: Samples latents from noise, as `as_sample` returns; by default the plain chain.
        scale: Scale of the model's adapters; 0 is the base model.
        seeds: Seeds of the starting noise; each prompt is sampled once for each seed.
        batch_size: Number of images generated at a time.
    """
    with _counted(model) as passes:
        started = time.perf_counter()
        parts = [generate(model, sampler, prompts, seed, scale, batch_size, method) for seed in seeds]
        seconds = time.perf_counter() - started
    everything = Samples.concatenate(parts)
    scores = score_samples(score, everything, [*prompts] * len(seeds), model.device, batch_size)
    count = len(everything)
    return GuidedImages(everything, scores, passes.forwards / count, passes.backwards / count, seconds)


def as_sample(method: Method, reward: Reward) -> Sample:
    """Return the function that samples latents with a method and a reward."""

    def sample(chain: SamplingChain, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        """Sample with the method; steps are recomputed if it differentiates through several."""
        if method.through_chain and chain.num_steps > 1:
            chain = replace(chain, recompute=Recompute(steps=True))
        score = latent_score(chain.model, reward, prompts, clamp=not method.needs_gradient)
        return method.function(chain, noise, score, **method.arguments())

    return sample


def summary(results: Mapping[str, GuidedImages]) -> list[dict[str, Any]]:
    """Return a row for each method with its cost, its mean scores, and the gains over the first method."""
    base = next(iter(results.values()))
    rows = []
    for label, found in results.items():
        gains = {name: found.gain(base, name) for name in found.scores}
        rows.append(
            {
                "method": label,
                "images": len(found.samples),
                "forwards_per_image": found.forwards,
                "backwards_per_image": found.backwards,
                "seconds": round(found.seconds, 2),
                "mean": {name: float(values.double().mean()) for name, values in found.scores.items()},
                "gain": {name: gain for name, (gain, _) in gains.items()},
                "standard_error_of_gain": {name: error for name, (_, error) in gains.items()},
            }
        )
    return rows


def write_json(results: Mapping[str, GuidedImages], settings: Mapping[str, Any], path: str | Path) -> None:
    """Write the settings and the summary."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps({**settings, "methods": summary(results)}, indent=1), encoding="utf-8")


def write_csv(
    results: Mapping[str, GuidedImages], prompts: Sequence[str], seeds: Sequence[int], path: str | Path
) -> None:
    """Write a row for each image: method, prompt, seed, and one column for each reward."""
    names = list(next(iter(results.values())).scores)
    places = [(prompt, seed) for seed in seeds for prompt in prompts]
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "prompt", "seed", *names])
        for label, found in results.items():
            for i, (prompt, seed) in enumerate(places):
                table.writerow([label, prompt, seed, *(f"{float(found.scores[name][i]):.6g}" for name in names)])


@contextmanager
def _counted(model: PipelineModel) -> Iterator[PassCounter]:
    counter = PassCounter()
    counter.attach(model)
    counter.start()
    try:
        yield counter
    finally:
        counter.detach()
