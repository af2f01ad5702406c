"""A reward that can be hacked, without and with a guard: the trained reward rises and the evaluation reward falls.

    python -m examples.over_optimization

A small JPEG file is trained, by DRaFT-1; that the shipped CLIP recognizes the prompt is held out. The run is made twice
from the same seed: once to the end, once under `OverOptimizationGuard(action="stop")`. `OUT/over_optimization.md` has
the models on the guard's fixed prompts and noise, and `OUT/over_optimization.png` the curves and the pictures.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_draft.callbacks import OverOptimizationGuard
from lightning_draft.callbacks.evaluation import Evaluation
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards import CLIPClassification, JPEGRate
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")


def build(arguments: argparse.Namespace) -> DraftModule:
    """The module that both runs train."""
    return DraftModule(
        model=StableDiffusion(
            arguments.model, lora=LoRA(rank=8, target_modules=LAYERS, seed=0), guidance=Guidance(1.0)
        ),
        reward=JPEGRate(),
        sampler=DDIM(arguments.sampling_steps),
        truncation=LastK(1),
        eval_rewards={"recognized": CLIPClassification(arguments.clip, captions=arguments.prompts)},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr),
    )


def run(arguments: argparse.Namespace, action: str) -> tuple[DraftModule, OverOptimizationGuard]:
    """Train with the guard's action."""
    module = build(arguments)
    guard = OverOptimizationGuard(
        action,  # type: ignore[arg-type]
        max_prompts=arguments.pictures,
        samples_per_prompt=3,
        dirpath=str(arguments.out / action),
    )
    trainer = L.Trainer(
        max_steps=arguments.steps,
        val_check_interval=arguments.every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        accelerator="auto",
        devices=1,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data(arguments))
    return module, guard


def data(arguments: argparse.Namespace) -> PromptDataModule:
    """Prompts, some of which are held out for the evaluation."""
    return PromptDataModule(arguments.prompts, batch_size=arguments.batch_size, val_size=arguments.pictures)


def pictures(module: DraftModule, prompts: list[str]) -> Tensor:
    """One picture of each prompt `(N, 3, H, W)`, from the same noise every time."""
    return module.generate(prompts, seed=1).clamp(0, 1)


def table(rows: dict[str, Evaluation]) -> str:
    """Models as markdown."""
    lines = [
        "| adapters | JPEG rate (trained) | recognized (held out) | drift | diversity | saturated |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {each.reward:.3f} | {each.eval_rewards['recognized']:.2f} | {each.image_drift:.3f} | "
        f"{each.diversity:.3f} | {each.saturated_pixel_fraction:.0%} |"
        for name, each in rows.items()
    ]
    return "\n".join(lines) + "\n"


def plot(history: dict[int, Evaluation], stopped: int, kept: int | None, rows: dict[str, Tensor], path: Path) -> None:
    """Both rewards by step, and a row of pictures of each model."""
    figure = Figure(figsize=(8, 3 + len(rows)), layout="constrained")
    curves, gallery = figure.subfigures(2, 1, height_ratios=[3, len(rows)])
    left = curves.subplots()
    right = left.twinx()
    left.plot(list(history), [each.reward for each in history.values()], "C0.-")
    right.plot(list(history), [each.eval_rewards["recognized"] for each in history.values()], "C3.-")
    left.axvspan(stopped, max(history), color="0.9")
    if kept is not None:
        left.axvline(kept, color="C2", linestyle="--")
    left.set(xlabel="optimization steps; green: what the guard keeps, grey: what it prevents")
    left.set_ylabel("trained: JPEG rate", color="C0")
    right.set_ylabel("held out: log p(prompt | picture)", color="C3")
    axes = gallery.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def main() -> None:
    """Both runs, then table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/over_optimization"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--prompts", default="emoji")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--every", type=int, default=3, help="steps between evaluations")
    parser.add_argument("--sampling-steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=6, help="prompts that are evaluated")
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec).*")
    start = time.perf_counter()
    unguarded, watcher = run(arguments, "warn")
    guarded, guard = run(arguments, "stop")
    prompts = data(arguments).val_prompts
    images: dict[str, Any] = {"end": pictures(unguarded, prompts)}
    with guarded.model.base():
        images["base"] = pictures(guarded, prompts)
    rows = {"base": watcher.history[0]}
    if guard.best_step is not None:
        guarded.model.load_lora(guard.best_path)
        images["kept"] = pictures(guarded, prompts)
        rows[f"kept by the guard, step {guard.best_step}"] = guard.history[guard.best_step]
    last = max(watcher.history)
    rows[f"without the guard, step {last}"] = watcher.history[last]
    order = [name for name in ("base", "kept", "end") if name in images]
    text = table(rows)
    (arguments.out / "over_optimization.md").write_text(text)
    plot(
        watcher.history,
        max(guard.history),
        guard.best_step,
        {name: images[name] for name in order},
        arguments.out / "over_optimization.png",
    )
    print(text, f"stopped at step {max(guard.history)}; {time.perf_counter() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
