"""Measure whether `Augmented`, `Ensemble` and `Relative` give better images at the same trained reward.

    python -m examples.robust_rewards
    python -m examples.robust_rewards --reward clip --steps 25

DRaFT trains the shipped model on a reward that is easily over-optimized, and on robust versions of it. With `--reward
classifier` this is the logit of a small classifier of clean images: alone (`ImageQuality`), averaged over augmentations
(`Augmented`), and together with the evaluation classifier (`Ensemble`, mean minus standard deviation). With `--reward
clip` it is the similarity of the shipped CLIP to captions without a style: alone (`CLIPScore`), and relative to the
same caption in the other style (`Relative`). Every few steps, images of the same captions and noise are scored. Two
runs are compared where the mean of the plain reward is equal; between two evaluations the scores are interpolated
linearly. `OUT/robust_rewards.md` has the differences from the plain reward with standard errors. The clean images need
the emoji (`python -m examples.emoji_model.data`).
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from examples.emoji_model.data import prepare
from examples.emoji_model.truth import ReferencePSNR, SceneRecognized
from examples.trainer import without_files
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import (
    Augmented,
    CleanFraction,
    CLIPClassification,
    CLIPScore,
    Ensemble,
    ImageQuality,
    Relative,
    Reward,
)
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
TRAINED = "plain reward"


@dataclass(frozen=True)
class Curve:
    """Scores of the same captions and noise in the course of a run.

    Args:
        steps: Optimizer steps of the evaluations, `T`.
        scores: Scores `(T, N)` by name.
    """

    steps: list[int]
    scores: Mapping[str, Tensor]

    def levels(self) -> list[float]:
        """Return the mean trained reward of each evaluation."""
        return [float(level) for level in self.scores[TRAINED].mean(1)]

    def at(self, level: float) -> dict[str, Tensor]:
        """Return scores `(N,)` where the mean trained reward first reaches `level`, interpolated linearly."""
        levels = self.levels()
        after = next(i for i, found in enumerate(levels) if found >= level)
        if after == 0:
            return {name: values[0] for name, values in self.scores.items()}
        weight = (level - levels[after - 1]) / (levels[after] - levels[after - 1])
        return {name: values[after - 1].lerp(values[after], weight) for name, values in self.scores.items()}


class Recorder(L.Callback):
    """Score images of fixed captions and noise every few steps.

    Args:
        prompts: The captions.
        criteria: Rewards by name.
        every: Steps between evaluations.
    """

    def __init__(self, prompts: list[str], criteria: Mapping[str, Reward], every: int) -> None:
        self.prompts = prompts
        self.criteria = criteria
        self.every = every
        self.found: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score the base model."""
        self.record(0, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Score the model every `every` steps."""
        if trainer.global_step % self.every == 0:
            self.record(trainer.global_step, pl_module)

    @torch.no_grad()
    def record(self, step: int, module: DraftModule) -> None:
        """Generate and score the images."""
        images = module.generate(self.prompts, seed=1).images.clamp(0, 1)
        self.found[step] = {name: reward(images, self.prompts) for name, reward in self.criteria.items()}

    def curve(self) -> Curve:
        """Return all scores."""
        names = list(self.criteria)
        return Curve(list(self.found), {n: torch.stack([each[n] for each in self.found.values()]) for n in names})


def classifier_rewards() -> dict[str, Reward]:
    """Return a classifier of clean images and its robust versions, by name; the scores are logits."""
    first, second = (ImageQuality(name, bounded=False) for name in ("emoji64-judge", "emoji64-judge-eval"))
    return {
        "ImageQuality": first,
        "Augmented": Augmented(first),
        "Ensemble": Ensemble({"first": first, "second": second}),
    }


def clip_rewards() -> dict[str, Reward]:
    """Return a reward that depends on the caption and its relative version, by name."""
    plain = CLIPScore("emoji64-clip")
    return {"CLIPScore": plain, "Relative": Relative(plain, "noto", "twemoji", k=1.0)}


REWARDS: dict[str, Callable[[], dict[str, Reward]]] = {"classifier": classifier_rewards, "clip": clip_rewards}
"""Rewards to train on; the first one is the plain reward."""


def captions(source: str, reward: str) -> list[str]:
    """Return captions; for CLIP without their style, which `Relative` writes before them."""
    found = [str(prompt) for prompt in read_prompts(source)]
    return [caption.partition(" ")[2] for caption in found] if reward == "clip" else found


def criteria(arguments: argparse.Namespace, plain: Reward, prompts: list[str]) -> dict[str, Reward]:
    """Return the rewards that measure the images."""
    file = str(arguments.clean_images)
    return {
        TRAINED: plain,
        "PSNR to the clean image (dB)": ReferencePSNR(file),
        "nearest image is the caption's": SceneRecognized(file),
        "evaluation classifier: log p(clean)": ImageQuality("emoji64-judge-eval"),
        "evaluation classifier: clean": CleanFraction("emoji64-judge-eval"),
        "CLIP: log p(caption)": CLIPClassification("emoji64-clip", prompts),
    }


def run(arguments: argparse.Namespace, reward: Reward, seed: int, recorder: Recorder) -> Curve:
    """Train on a reward."""
    module = DraftModule(
        model=StableDiffusion(
            arguments.model, lora=LoRA(rank=8, target_modules=LAYERS, seed=seed), guidance=Guidance(1.0)
        ),
        reward=reward,
        sampler=DDIM(arguments.sampling_steps),
        truncation=LastK(1),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr),
        seed=seed,
    )
    trainer = without_files(recorder, max_steps=arguments.steps)
    torch.manual_seed(seed)
    prompts = captions(arguments.prompts, arguments.reward)
    data = PromptDataModule(prompts, val_size=1, batch_size=arguments.batch_size, seed=seed)
    trainer.fit(module, data)
    return recorder.curve()


def difference(ours: list[Tensor], plain: list[Tensor]) -> tuple[float, float]:
    """Return the mean difference of scores `(S, N)` over seeds and captions, and its standard error.

    The variance is the sum of that of the mean over captions and that of the mean over seeds.
    """
    change = torch.stack(ours).double() - torch.stack(plain).double()
    variance = change.mean(0).var() / change.shape[1]
    if len(change) > 1:
        variance = variance + change.mean(1).var() / len(change)
    return float(change.mean()), math.sqrt(float(variance))


def table(curves: Mapping[str, list[Curve]], fractions: tuple[float, ...] = (0.5, 1.0)) -> str:
    """Return the scores of the runs at equal trained reward as markdown.

    Args:
        curves: The runs of each reward, by its name; the first one is the plain reward.
        fractions: Levels of the trained reward between that of the base model and the highest that all runs reach.
    """
    first = next(iter(curves))
    every = [curve for runs in curves.values() for curve in runs]
    base = every[0].levels()[0]
    highest = min(max(curve.levels()) for curve in every)
    names = [name for name in every[0].scores if name != TRAINED]
    lines = [
        f"| {TRAINED} | trained on | steps | " + " | ".join(names) + " |",
        "|--:|---|--:" + "|--:" * len(names) + "|",
    ]
    start = [f"{float(every[0].scores[name][0].mean()):.3f}" for name in names]
    lines.append(f"| {base:.3f} | (base model) | 0 | " + " | ".join(start) + " |")
    for fraction in fractions:
        level = base + fraction * (highest - base)
        plain = [curve.at(level) for curve in curves[first]]
        for reward, runs in curves.items():
            found = [curve.at(level) for curve in runs]
            cells = [_cell([f[n] for f in found], [p[n] for p in plain], reward == first) for n in names]
            steps = ", ".join(str(_first_step(curve, level)) for curve in runs)
            lines.append(f"| {level:.3f} | {reward} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: list[Tensor], plain: list[Tensor], is_plain: bool) -> str:
    if is_plain:
        return f"{float(torch.stack(found).mean()):.3f}"
    mean, error = difference(found, plain)
    return f"{mean:+.3f} ± {error:.3f}"


def _first_step(curve: Curve, level: float) -> int:
    return next(step for step, found in zip(curve.steps, curve.levels(), strict=True) if found >= level)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/robust_rewards"))
    parser.add_argument("--reward", choices=REWARDS, default="classifier", help="what is trained on")
    parser.add_argument("--model", default="emoji64")
    parser.add_argument("--prompts", default="emoji64")
    parser.add_argument("--val-prompts", default="emoji64_eval")
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"), help="the clean images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    """Train on each reward with each seed, unless its curve is in OUT, and write the table."""
    arguments = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec|val_dataloader).*")
    start = time.process_time()
    prepare(arguments.clean_images.parent)
    prompts = captions(arguments.val_prompts, arguments.reward)
    rewards = REWARDS[arguments.reward]()
    measures = criteria(arguments, next(iter(rewards.values())), prompts)
    curves: dict[str, list[Curve]] = {}
    for seed in range(arguments.seeds):
        for name, reward in rewards.items():
            path = arguments.out / f"{name.replace(' ', '_')}_{seed}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                curve = run(arguments, reward, seed, Recorder(prompts, measures, arguments.every))
                torch.save({"steps": curve.steps, "scores": dict(curve.scores)}, path)
            curves.setdefault(name, []).append(Curve(**torch.load(path, weights_only=True)))
            print(name, seed, f"{time.process_time() - start:.0f} s", flush=True)
    text = table(curves)
    (arguments.out / "robust_rewards.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
