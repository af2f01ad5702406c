"""Compare full back-propagation through few-step models with DRaFT-1 through a chain of 10 steps, at equal CPU seconds.

    python -m examples.emoji_model.few_step --num-steps 4
    python -m examples.emoji_model.few_step --num-steps 2 --teacher runs/emoji_few_step/4
    python -m examples.few_steps

Every run trains the quickstart's adapters on `emoji64-judge`. After 0, 1/8, 1/4, 1/2 and all of the seconds, the model
generates the evaluation captions with its own chain and fixed noise; the time of evaluations is not counted.
`OUT/few_steps.jsonl` has one line per finished run, and a second call continues there; `OUT/few_steps.md` has means and
standard errors over the seeds, `OUT/few_steps.png` the curves.
"""

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure

from examples.emoji_model.evaluate import mean_and_error
from examples.emoji_model.truth import ReferencePSNR
from examples.method_table.runs import Run, RunFile
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import CleanFraction, ImageQuality, Reward
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full, LastK, Truncation

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
FRACTIONS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Setting:
    """A model, its number of steps, and the truncation."""

    model: str
    num_steps: int
    truncation: Truncation


def settings(students: Path) -> dict[str, Setting]:
    """Return the compared settings by label."""
    return {
        "2-step model, full": Setting(str(students / "2"), 2, Full()),
        "4-step model, full": Setting(str(students / "4"), 4, Full()),
        "base, 4 steps, full": Setting("emoji64", 4, Full()),
        "base, 10 steps, DRaFT-1": Setting("emoji64", 10, LastK(1)),
        "base, 10 steps, full": Setting("emoji64", 10, Full()),
    }


def build(setting: Setting, seed: int, arguments: argparse.Namespace) -> DraftModule:
    """Return the module that trains a setting."""
    return DraftModule(
        model=StableDiffusion(
            setting.model, lora=LoRA(rank=8, target_modules=LAYERS, seed=seed), guidance=Guidance(1.0)
        ),
        reward=ImageQuality("emoji64-judge"),
        sampler=DDIM(setting.num_steps),
        truncation=setting.truncation,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr),
    )


class Curve(L.Callback):
    """Evaluate when fractions of the CPU seconds are used, and stop at the last."""

    def __init__(self, seconds: float, rewards: dict[str, Reward], prompts: list[str]) -> None:
        self.seconds, self.rewards, self.prompts = seconds, rewards, prompts
        self.milestones = [fraction * seconds for fraction in FRACTIONS]
        self.rows: list[dict[str, float]] = []
        self._used, self._start = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate the model before the first step."""
        self._evaluate(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop the clock, and evaluate at a milestone."""
        self._used += time.process_time() - self._start
        self._evaluate(trainer, pl_module)
        trainer.should_stop = not self.milestones

    @torch.no_grad()
    def _evaluate(self, trainer: L.Trainer, module: DraftModule) -> None:
        if not self.milestones or self._used < self.milestones[0]:
            return
        self.milestones = [each for each in self.milestones if each > self._used]
        images = module.generate(self.prompts, seed=10_000).clamp(0, 1)
        scores = {name: reward(images, self.prompts).mean().item() for name, reward in self.rewards.items()}
        self.rows.append({"seconds": self._used, "steps": trainer.global_step, **scores})


def criteria(clean_images: Path) -> dict[str, Reward]:
    """Return the rewards that measure the images."""
    found: dict[str, Reward] = {
        "reward": ImageQuality("emoji64-judge"),
        "evaluation": ImageQuality("emoji64-judge-eval"),
        "clean": CleanFraction("emoji64-judge-eval"),
    }
    return {**found, "PSNR": ReferencePSNR(str(clean_images))} if clean_images.exists() else found


def train(setting: Setting, seed: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train one setting with one seed, and return its evaluations."""
    L.seed_everything(seed, verbose=False)
    curve = Curve(arguments.seconds, criteria(arguments.clean_images), [str(p) for p in read_prompts("emoji64_eval")])
    trainer = L.Trainer(
        max_steps=100_000,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(build(setting, seed, arguments), PromptDataModule("emoji64", batch_size=arguments.batch_size))
    return curve.rows


def of_setting(runs: list[Run], label: str) -> torch.Tensor:
    """Return the evaluations of a setting, `(seeds, milestones, columns)`."""
    return torch.tensor([[list(row.values()) for row in run["evaluations"]] for run in runs if run["setting"] == label])


def table(runs: list[Run]) -> str:
    """Return first and last evaluation of each setting as markdown, with standard errors over the seeds."""
    columns = list(runs[0]["evaluations"][0])[2:]
    lines = ["| setting | steps | " + " | ".join(f"{name}, before | after" for name in columns) + " |"]
    lines.append("|---" * (2 + 2 * len(columns)) + "|")
    for label in dict.fromkeys(run["setting"] for run in runs):
        values = of_setting(runs, label)
        cells = [
            "{:.2f} ± {:.2f}".format(*mean_and_error(values[:, i, 2 + k])) for k in range(len(columns)) for i in (0, -1)
        ]
        lines.append(f"| {label} | {values[:, -1, 1].mean():.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: list[Run], path: Path) -> None:
    """Plot trained and evaluation reward by CPU seconds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    columns = list(runs[0]["evaluations"][0])
    for axis, name in zip(figure.subplots(1, 2), ("reward", "evaluation"), strict=True):
        for label in dict.fromkeys(run["setting"] for run in runs):
            values = of_setting(runs, label)
            spread = values[..., columns.index(name)].std(0) / len(values) ** 0.5
            axis.errorbar(
                values[..., 0].mean(0), values[..., columns.index(name)].mean(0), spread, marker=".", label=label
            )
        axis.set(xlabel="CPU seconds of training", ylabel=f"{name}: log p(clean)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"))
    parser.add_argument("--students", type=Path, default=Path("runs/emoji_few_step"))
    parser.add_argument("--seconds", type=float, default=48, help="CPU seconds of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec).*")
    file = RunFile(arguments.out / "few_steps.jsonl")
    identity = {"seconds": arguments.seconds, "batch_size": arguments.batch_size, "lr": arguments.lr}
    for seed in range(arguments.seeds):
        for label, setting in settings(arguments.students).items():
            named = {"setting": label, "seed": seed, **identity}
            if file.find(**named) is None:
                run = file.add({**named, "evaluations": train(setting, seed, arguments)})
                print(label, seed, run["evaluations"][-1], flush=True)
    runs = [run for run in file.all() if all(run[key] == value for key, value in identity.items())]
    (arguments.out / "few_steps.md").write_text(table(runs))
    plot(runs, arguments.out / "few_steps.png")
    print(table(runs))


if __name__ == "__main__":
    main()
