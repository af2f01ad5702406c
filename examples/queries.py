"""Count the reward queries that methods need until an evaluation is reached, with chains of any length.

    python -m examples.queries
    python -m examples.queries --configs ppo loop reinforce --num-steps 10

Each config of `examples.method_table` trains the shipped model with the options that were tuned there, through
`--num-steps` steps, until `emoji64-judge-eval` gives a mean log p(clean) of `--level` to images of evaluation captions,
which are generated with as many deterministic steps; or for `--seconds` CPU seconds of one thread. `OUT/runs.jsonl` has
one line per finished run, and a second call continues there.
"""

import argparse
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.before_after import ordered
from examples.method_table.__main__ import commit
from examples.method_table.measure import Evaluation, Meter, Row, is_valid, rewards
from examples.method_table.methods import build, kind, shipped_configs
from examples.method_table.report import cell, line, to_reach
from examples.method_table.runs import Run, RunFile
from examples.trainer import without_files
from lightning_draft.models import PipelineModel

TUNED = RunFile(Path(__file__).parent / "results" / "methods" / "runs.jsonl")
"""Runs of `examples.method_table`, with the tuned options of each config."""
SECONDS = {"direct gradients": 0.2, "gradient matching": 0.5, "forward process": 1.0, "policy gradients": 3.0}
"""CPU seconds between evaluations, for each sampling step."""


def train(config: str, seed: int, arguments: argparse.Namespace, evaluation: Evaluation) -> Meter:
    """Train a config until the level is reached or the time is up."""
    tuned, num_steps = TUNED.find(config=config), arguments.num_steps
    assert tuned is not None
    options = [f"--{name}={value!r}" for name, value in tuned["options"].items()]
    options += [f"--model.sampler.init_args.num_steps={num_steps}", *(f"--{option}" for option in arguments.options)]
    module, data, trainer = build(config, seed, options)
    if kind(config) == "policy gradients" and module.window is None:
        trainer["accumulate_grad_batches"] = num_steps - 1  # all steps with noise
    assert isinstance(module.model, PipelineModel)

    def reached(scores: Row, milestone: int) -> bool:
        print(f"{config}, seed {seed}: {meter.evaluations[-1]}", flush=True)
        return scores["evaluation"] >= arguments.level and is_valid(scores)

    every = SECONDS[kind(config)] * num_steps
    milestones = [every * (i + 1) for i in range(max(1, round(arguments.seconds / every)))]
    meter = Meter(milestones, evaluation, evaluation(module.model), reached)
    without_files(meter, max_steps=-1, accelerator="cpu", **trainer).fit(module, data)
    return meter


def table(runs: Sequence[Run], level: float) -> str:
    """Return the costs until the level is reached, as means over the seeds with standard errors."""
    head = ["config", "seeds", f"queries to {level:g}", "passes", "CPU seconds", "last evaluation", "PSNR"]
    lines = [line(head), "|---" * len(head) + "|\n"]
    for config in dict.fromkeys(run["config"] for run in runs):
        own = [run for run in runs if run["config"] == config]
        costs = [_cost([to_reach(run, level, key) for run in own]) for key in ("queries", "passes", "seconds")]
        last = [cell([run["evaluations"][-1].get(key, math.nan) for run in own]) for key in ("evaluation", "PSNR")]
        lines.append(line([config, str(len(own)), *costs, *last]))
    return "".join(lines)


def _cost(values: Sequence[float]) -> str:
    reached = sum(map(math.isfinite, values))
    return cell(values, 0) if reached == len(values) else f"reached by {reached}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", choices=shipped_configs(), metavar="CONFIG", default=["draft", "draft_1", "ppo"]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/queries"))
    parser.add_argument("--num-steps", type=int, default=50, help="sampling steps, in training and evaluation")
    parser.add_argument("--level", type=float, default=-0.5, help="mean log p(clean) of emoji64-judge-eval")
    parser.add_argument("--seconds", type=float, default=3000, help="CPU seconds of a run at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=12, help="evaluation prompts, two images each")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="NAME=VALUE", help="options of the configs after the tuned ones"
    )
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"))
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    arguments = parse(words)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec|instantiate_classes).*")
    prompts = ordered("emoji64_eval")[: arguments.prompts]
    evaluation = Evaluation(rewards(arguments.clean_images), prompts, 2, 10_000, arguments.num_steps)
    file = RunFile(arguments.out / "runs.jsonl")
    common: dict[str, Any] = {"num_steps": arguments.num_steps, "level": arguments.level, "limit": arguments.seconds}
    common["options"] = " ".join(arguments.options)
    for seed in arguments.seeds:
        for config in arguments.configs:
            if file.find(config=config, seed=seed, **common) is None:
                meter = train(config, seed, arguments, evaluation)
                rows = {"evaluations": meter.evaluations, "curve": meter.curve}
                file.add({"config": config, "seed": seed, **common, "commit": commit(), **rows})
    print(table([run for run in file.all() if common.items() <= run.items()], arguments.level))


if __name__ == "__main__":
    main()
