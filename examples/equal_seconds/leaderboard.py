"""Time to reward: CPU seconds until an evaluation reward reaches a level, for each shipped config.

    python -m examples.equal_seconds.leaderboard
    python -m examples.equal_seconds.leaderboard --configs draft_k ppo --seeds 1

Every method of `configs/` on the shipped model and its quality reward is trained with its own settings on one CPU
thread. Every few seconds of training, the model generates 40 evaluation captions with 10 deterministic steps from the
same noise, and `emoji64-judge-eval` scores them; this time is not counted. A run ends when the mean score reaches the
level, or when its seconds are used up. `OUT/leaderboard.jsonl` has one line per finished run, and a second call
continues there; `OUT/leaderboard.md` is the table, with the command, the commit and the date.
"""

import argparse
import logging
import subprocess
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from examples.before_after import ordered
from examples.emoji_model.evaluate import mean_and_error
from examples.equal_seconds.measure import Rows
from examples.method_table.runs import Run, RunFile
from examples.trainer import without_files
from lightning_draft.callbacks import CostMonitor
from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.process import process_arguments
from lightning_draft.image_generation import generate
from lightning_draft.rewards import CleanFraction, ImageQuality, Reward
from lightning_draft.samplers import DDIM

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped_configs() -> list[str]:
    """Return the names of the configs on the shipped model and its quality reward."""
    return [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if _is_compared(yaml.safe_load(path.read_text()))]


def _is_compared(config: dict[str, Any]) -> bool:
    options = config["model"]["init_args"]
    quality = {"class_path": "ImageQuality", "init_args": {"pretrained": "emoji64-judge"}}
    return options["model"]["init_args"].get("pretrained") == "emoji64" and options["reward"] == quality


class TimeToReward(CostMonitor):
    """Evaluate every `every` CPU seconds of training; stop at the level, or after `limit` seconds.

    Attributes:
        evaluations: One row per evaluation: CPU seconds, optimizer steps, reward queries, network passes, and scores.
    """

    def __init__(self, level: float, limit: float, every: float) -> None:
        super().__init__()
        self.level, self.limit, self.every = level, limit, every
        self.prompts = ordered("emoji64_eval")[:40]
        self.scores: dict[str, Reward] = {
            "evaluation": ImageQuality("emoji64-judge-eval"),
            "clean": CleanFraction("emoji64-judge-eval"),
        }
        self.evaluations: Rows = []
        self.cpu_seconds, self._cpu_started, self._next = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate the model before the first step."""
        super().on_train_start(trainer, pl_module)
        self._evaluate(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_batch_start(*args)
        self._cpu_started = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop the clock, and evaluate if it is time."""
        super().on_train_batch_end(trainer, pl_module, *args)
        self.cpu_seconds += time.process_time() - self._cpu_started
        if self.cpu_seconds >= self._next:
            self._evaluate(trainer, pl_module)
            trainer.should_stop = self.reached or self.cpu_seconds >= self.limit

    @property
    def reached(self) -> bool:
        """Return whether the last evaluation reached the level."""
        return self.evaluations[-1]["evaluation"] >= self.level

    @torch.no_grad()
    def _evaluate(self, trainer: L.Trainer, module: Any) -> None:
        self._next = self.cpu_seconds + self.every
        images = generate(module.model, DDIM(10), self.prompts, 10_000, batch_size=40).clamp(0, 1)
        spent = {
            "seconds": self.cpu_seconds,
            "steps": trainer.global_step,
            "queries": self.reward_queries,
            "passes": self.network_forwards + self.network_backwards,
        }
        scores = {name: reward(images, self.prompts).mean().item() for name, reward in self.scores.items()}
        self.evaluations.append({**spent, **scores})


def train(config: str, seed: int, level: float, limit: float, every: float) -> TimeToReward:
    """Train a shipped config, and return what was measured."""
    options = ["--config", str(CONFIGS / f"{config}.yaml"), "--seed_everything", str(seed)]
    with process_arguments(["fit", *options]):
        cli = BuildCLI("fit")
    meter = TimeToReward(level, limit, every)
    written = cli.config_init["fit"]["trainer"]
    kept = {name: written[name] for name in ("accumulate_grad_batches", "gradient_clip_val")}
    trainer = without_files(meter, max_steps=-1, accelerator="cpu", **kept)
    trainer.fit(cli.model, cli.datamodule)
    return meter


def table(runs: list[Run], level: float) -> str:
    """Return one row per config, fastest first, as markdown; the cost is the mean over the seeds."""
    rows = []
    for config in dict.fromkeys(run["config"] for run in runs):
        last = [run["evaluations"][-1] for run in runs if run["config"] == config]
        reached = [row for row in last if row["evaluation"] >= level]
        scores = torch.tensor([[row["evaluation"], row["clean"]] for row in last])
        cells = [config, f"{len(reached)} of {len(last)}"]
        if len(reached) == len(last):
            spent = torch.tensor([[row[key] for key in ("seconds", "queries", "passes")] for row in last])
            mean, error = mean_and_error(spent[:, 0])
            cells += [f"{mean:.1f} ± {error:.1f}", f"{spent[:, 1].mean():,.0f}", f"{spent[:, 2].mean():,.0f}"]
        else:
            mean = 1e6 - scores[:, 0].mean().item()
            cells += [
                "not reached",
                *(f"{sum(row[k] for row in last) / len(last):,.0f}" for k in ("queries", "passes")),
            ]
        cells += [f"{scores[:, 0].mean():.2f}", f"{100 * scores[:, 1].mean():.0f} %"]
        rows.append((mean, "| " + " | ".join(cells) + " |"))
    head = "| config | seeds at the level | CPU seconds | reward queries | network passes | evaluation | clean |"
    return "\n".join([head, "|---" * 7 + "|", *(line for _, line in sorted(rows))]) + "\n"


def commit() -> str:
    """Return the commit of the checkout, or `unknown`."""
    command = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=shipped_configs())
    parser.add_argument("--out", type=Path, default=Path("runs/equal_seconds"))
    parser.add_argument("--level", type=float, default=-0.5, help="mean log p(clean) of emoji64-judge-eval")
    parser.add_argument("--seconds", type=float, default=120, help="CPU seconds of a run that does not reach the level")
    parser.add_argument("--every", type=float, default=5, help="CPU seconds between evaluations")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec).*")
    file = RunFile(arguments.out / "leaderboard.jsonl")
    limits = {"level": arguments.level, "limit": arguments.seconds, "every": arguments.every}
    for seed in range(arguments.seeds):
        for config in arguments.configs:
            if file.find(config=config, seed=seed, **limits) is None:
                meter = train(config, seed, **limits)
                date = datetime.now(UTC).date().isoformat()
                row = {"config": config, "seed": seed, **limits, "commit": commit(), "date": date}
                run = file.add({**row, "evaluations": meter.evaluations})
                print(config, seed, run["evaluations"][-1], flush=True)
    runs = [run for run in file.all() if all(run[key] == value for key, value in limits.items())]
    commits = ", ".join(sorted({f"{run['commit']} ({run['date']})" for run in runs}))
    text = (
        f"CPU seconds of one thread until the mean log p(clean) of `emoji64-judge-eval` reaches {arguments.level:g}; "
        f"evaluated every {arguments.every:g} s, at most {arguments.seconds:g} s. Commit {commits}.\n\n"
        f"{table(runs, arguments.level)}"
    )
    (arguments.out / "leaderboard.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
