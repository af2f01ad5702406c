"""Images and scores at several scales of a LoRA, and the best scale by an evaluation reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.image_generation import Score, generate, score_samples
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import Sampler


@dataclass(frozen=True)
class ScaleSweep:
    """Images of the same prompts and noise at several scales.

    Args:
        prompts: `N` prompts, repeated for each seed.
        images: By scale, `(N, 3, H, W)` on the CPU.
        scores: By scale and name of the reward, `(N,)`.
        evaluation: Names of the rewards that were not trained on.
    """

    prompts: Sequence[str]
    images: Mapping[float, Tensor]
    scores: Mapping[float, Mapping[str, Tensor]]
    evaluation: Sequence[str] = ()

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards."""
        return list(next(iter(self.scores.values()), {}))

    def mean(self, reward: str, scale: float) -> float:
        """Return the mean of a reward at a scale."""
        return float(self.scores[scale][reward].double().mean())

    def best_scale(self) -> tuple[float, str] | None:
        """Return the scale with the highest mean of the first evaluation reward, and the name of the reward.

        Without an evaluation reward, the first reward is used; without any reward, return None.
        """
        name = next(iter([*self.evaluation, *self.rewards]), None)
        return None if name is None else (max(self.scores, key=lambda scale: self.mean(name, scale)), name)

    def gains(self, reward: str) -> list[float]:
        """Return the mean of a reward minus that at scale 0 (or the first), in its standard deviations over images."""
        reference = 0.0 if 0.0 in self.scores else next(iter(self.scores))
        spread = float(self.scores[reference][reward].double().std(correction=0)) or 1.0
        return [(self.mean(reward, scale) - self.mean(reward, reference)) / spread for scale in self.scores]


def sweep(
    model: PipelineModel,
    sampler: Sampler,
    prompts: Sequence[str],
    scales: Sequence[float],
    score: Score | None = None,
    *,
    evaluation: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
) -> ScaleSweep:
    """Generate and score images of the same prompts and noise at several scales of the model's adapters.

    Args:
        model: A model with adapters, unless all scales are 0.
        sampler: The sampler.
        prompts: Prompts.
        scales: The weights are `theta_0 + scale dW`.
        score: Called with `B` samples, whose images are in [0, 1], and `B` prompts; returns scores `(B,)` by name.
        evaluation: Names of the scores that were not trained on; the first one determines the best scale.
        seeds: Seeds of the starting noise; each prompt is sampled once for each seed.
        batch_size: Number of images generated at a time.
    """
    everything = [prompt for _ in seeds for prompt in prompts]
    samples = {
        scale: Samples.concatenate([generate(model, sampler, prompts, seed, scale, batch_size) for seed in seeds])
        for scale in dict.fromkeys(scales)
    }
    scores = {}
    if score is not None:
        scores = {s: score_samples(score, x, everything, model.device, batch_size) for s, x in samples.items()}
    images = {scale: each.content for scale, each in samples.items()}
    return ScaleSweep(everything, images, scores, evaluation)


def save_plot(result: ScaleSweep, path: str | Path) -> None:
    """Plot the gains of all rewards against the scale; curves that diverge show over-optimization.

    Args:
        result: Result with scores.
        path: The image file.

    Raises:
        ConfigurationError: There are no scores, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = result.best_scale()
    if best is None:
        raise ConfigurationError("there are no rewards to plot; write --reward NAME")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for name in result.rewards:
        style = {"linestyle": "--"} if name in result.evaluation else {}
        label = f"{name} ({'evaluation' if name in result.evaluation else 'trained'})"
        pairs = sorted(zip(result.scores, result.gains(name), strict=True))
        axes.plot(*zip(*pairs, strict=True), marker="o", label=label if result.evaluation else name, **style)
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    axes.axvline(best[0], color="0.4", linestyle=":", label=f"best {best[1]}: scale {best[0]:g}")
    axes.set(xlabel="scale of the LoRA", ylabel="gain in standard deviations of the base")
    axes.legend()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120)
