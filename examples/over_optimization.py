"""Over-optimization with and without a guard: the trained reward rises and the evaluation reward falls.

    python -m examples.over_optimization

DRaFT trains on the JPEG file size alone; a classifier of clean images is the evaluation reward. The run is made twice
from the same seed: once to the end, once under `OverOptimizationGuard(action="stop")`. Then the base model, the
adapters that the guard saved and those of the unguarded run are compared on the same captions and noise:
`OUT/over_optimization.md` has the means with standard errors, `OUT/over_optimization.png` the curves and the first
images. The distance to the clean image needs the emoji (`python -m examples.emoji_model.data`).
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.emoji_model.evaluate import mean_and_error
from examples.emoji_model.truth import ReferencePSNR
from examples.trainer import without_files
from lightning_draft.callbacks import OverOptimizationGuard
from lightning_draft.callbacks.evaluation import Evaluation
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import CleanFraction, ImageQuality, JPEGRate, Reward
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")


def build(arguments: argparse.Namespace) -> DraftModule:
    """Return the module that both runs train."""
    return DraftModule(
        model=StableDiffusion(
            arguments.model, lora=LoRA(rank=8, target_modules=LAYERS, seed=0), guidance=Guidance(1.0)
        ),
        reward=JPEGRate(),
        sampler=DDIM(arguments.sampling_steps),
        truncation=LastK(1),
        eval_rewards={"clean": ImageQuality(arguments.classifier)},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr),
    )


def run(arguments: argparse.Namespace, action: str) -> tuple[DraftModule, OverOptimizationGuard]:
    """Train with the guard's action."""
    module = build(arguments)
    guard = OverOptimizationGuard(
        action,  # type: ignore[arg-type]
        max_prompts=arguments.guarded,
        samples_per_prompt=2,
        dirpath=str(arguments.out / action),
    )
    trainer = without_files(
        guard,
        max_steps=arguments.steps,
        val_check_interval=arguments.every,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    prompts = PromptDataModule(
        arguments.prompts, val_prompts=arguments.val_prompts, batch_size=arguments.batch_size, val_batch_size=2
    )
    trainer.fit(module, prompts)
    return module, guard


def criteria(arguments: argparse.Namespace) -> dict[str, Reward]:
    """Return the rewards that measure the images."""
    found: dict[str, Reward] = {
        "JPEG rate (trained)": JPEGRate(),
        "clean (evaluation)": CleanFraction(arguments.classifier),
    }
    if arguments.clean_images.exists():
        found["PSNR to the clean image (dB)"] = ReferencePSNR(str(arguments.clean_images))
    return found


def table(images: dict[str, Tensor], prompts: list[str], criteria: dict[str, Reward]) -> str:
    """Return the means and standard errors of the images of each model as markdown."""
    lines = ["| adapters | " + " | ".join(criteria) + " |", "|---" * (len(criteria) + 1) + "|"]
    for name, batch in images.items():
        cells = (mean_and_error(reward(batch, prompts)) for reward in criteria.values())
        lines.append(f"| {name} | " + " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(history: dict[int, Evaluation], stopped: int, kept: int | None, rows: dict[str, Tensor], path: Path) -> None:
    """Plot both rewards by step, and a row of images of each model."""
    figure = Figure(figsize=(9, 3 + 1.1 * len(rows)), layout="constrained")
    curves, gallery = figure.subfigures(2, 1, height_ratios=[3, 1.1 * len(rows)])
    left = curves.subplots()
    right = left.twinx()
    left.plot(list(history), [each.reward for each in history.values()], "C0.-")
    right.plot(list(history), [each.eval_rewards["clean"] for each in history.values()], "C3.-")
    left.axvspan(stopped, max(history), color="0.9")
    if kept is not None:
        left.axvline(kept, color="C2", linestyle="--")
    left.set(xlabel="optimization steps; green: saved by the guard, gray: not run under the guard")
    left.set_ylabel("trained: JPEG rate", color="C0")
    right.set_ylabel("evaluation: log p(clean)", color="C3")
    axes = gallery.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/over_optimization"))
    parser.add_argument("--model", default="emoji64")
    parser.add_argument("--classifier", default="emoji64-judge-eval")
    parser.add_argument("--prompts", default="emoji64")
    parser.add_argument("--val-prompts", default="emoji64_eval")
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"), help="the clean images")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--guarded", type=int, default=8, help="prompts that the guard evaluates")
    parser.add_argument("--measured", type=int, default=48, help="captions of the table")
    parser.add_argument("--shown", type=int, default=8, help="of those, images in the figure")
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    """Train twice, then write the table and the figure."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec).*")
    start = time.process_time()
    unguarded, watcher = run(arguments, "warn")
    guarded, guard = run(arguments, "stop")
    trained = time.process_time()
    known = read_prompts(arguments.val_prompts)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: arguments.measured]
    prompts = [known[i] for i in order.tolist()]
    with guarded.model.base():
        images = {"base": guarded.generate(prompts, seed=1).images.clamp(0, 1)}
    if guard.best_step is not None:
        guarded.model.load_lora(guard.best_path)
        images[f"saved by the guard, step {guard.best_step}"] = guarded.generate(prompts, seed=1).images.clamp(0, 1)
    images[f"without the guard, step {max(watcher.history)}"] = unguarded.generate(prompts, seed=1).images.clamp(0, 1)
    text = table(images, prompts, criteria(arguments))
    (arguments.out / "over_optimization.md").write_text(text)
    shown = {name: batch[: arguments.shown] for name, batch in images.items()}
    plot(watcher.history, max(guard.history), guard.best_step, shown, arguments.out / "over_optimization.png")
    print(text, f"stopped at step {max(guard.history)}; {trained - start:.0f} s of CPU time for both runs", sep="\n")


if __name__ == "__main__":
    main()
