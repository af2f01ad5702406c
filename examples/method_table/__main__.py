"""Compare all methods on the shipped model at equal CPU seconds: the table of methods, with the time to reward.

    python -m examples.method_table
    python -m examples.method_table --configs draft_k nft --seeds 1
    python -m examples.method_table --report

A method is a config of `configs/` on the shipped model and its quality reward, `emoji64-judge`. Optuna tunes the
learning rate of each, and its own parameter if it has one, for `--tuning-seconds` in total: trials of a third of
them, pruned by the median, scored by `emoji64-judge-eval` on training captions and noise that is used for nothing else,
with a penalty if under 95 % of the images show the emoji of their caption.
Then each seed trains for `--seconds`, and is evaluated on `emoji64_eval` with 10 deterministic steps. Seconds are CPU
seconds of one thread; evaluations are not counted. A method is compared at equal seconds, reward queries and network
passes, and by the cost until the evaluation reaches `--level` with at least 95 % of the images recognized.

`OUT/runs.jsonl` has one line per finished run, `OUT/tuning.log` all trials, and a second call continues there, with the
options of the stored runs: `--out examples/results/methods` adds to the runs of the documentation. Several processes
may share the work by `--configs`. `OUT/methods.md` has the tables, `OUT/methods.png` the curves.
Comparisons with the clean images of the captions need `python -m examples.emoji_model.data`.
"""

import argparse
import logging
import subprocess
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from examples.before_after import ordered
from examples.method_table import report
from examples.method_table.measure import Evaluation, Meter, Row, Stop, never, objective, rewards
from examples.method_table.methods import CONFIGS, LR, OWN, build, shipped_configs, written
from examples.method_table.runs import Run, RunFile
from examples.method_table.tuning import Options, Report, around, tune
from examples.trainer import without_files
from lightning_draft.models import PipelineModel

FRACTIONS = (1 / 4, 1 / 2, 1.0)
TRIALS = 3
"""Trials of full length that fit into the seconds of tuning."""


class Table:
    """All runs, stored in one folder.

    Args:
        out: Folder of the runs, the trials and the results.
        seconds: CPU seconds of a run.
        tuning_seconds: CPU seconds of all trials of a method together.
        clean_images: File of the clean images of the captions.
        prompts: Evaluation prompts.
    """

    def __init__(self, out: Path, seconds: float, tuning_seconds: float, clean_images: Path, prompts: int = 20) -> None:
        self.out, self.seconds, self.tuning_seconds = out, seconds, tuning_seconds
        self.file = RunFile(out / "runs.jsonl")
        scores = rewards(clean_images)
        self._final = Evaluation(scores, ordered("emoji64_eval")[:prompts], 2, seed=10_000)
        self._tuning = Evaluation(scores, ordered("emoji64")[: -(-prompts // 2)], 2, seed=20_000)
        self._untrained: dict[Evaluation, Row] = {}

    def tuned(self, config: str) -> Options:
        """Return the tuned options of a config: those of its stored run, or of the best trial."""
        stored = self.file.find(config=config, limit=self.seconds)
        if stored is not None:
            return dict(stored["options"])
        options = {LR: written(config, LR)}
        ranges = dict[str, tuple[float, float]]()
        if config in OWN:
            own = OWN[config]
            options[own.option] = written(config, own.option)
            ranges[own.option] = (own.low, own.high)

        def trial(options: Options, stop: Report) -> float:
            """Train with a trial's options, and return the CPU seconds used."""
            seconds = self.tuning_seconds / TRIALS

            def pruned(scores: Row, milestone: int) -> bool:
                return stop(objective(scores), milestone)

            meter = self._train(config, 1000, options, seconds, self._tuning, pruned)
            print(f"{config}, trial {options}: {meter.evaluations[-1]['evaluation']:.3f}", flush=True)
            return meter.cpu_seconds

        space = around(options, ranges)
        return tune(self.out / "tuning.log", config, options, space, self.tuning_seconds, trial)

    def run(self, config: str, seed: int) -> Run:
        """Tune and train, or return the run if it is in the file."""
        kept = self.file.find(config=config, seed=seed, limit=self.seconds)
        if kept is None:
            options = self.tuned(config)
            meter = self._train(config, seed, options, self.seconds, self._final)
            identity = {"config": config, "seed": seed, "limit": self.seconds, "options": options}
            when = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
            kept = self.file.add({**identity, **when, "evaluations": meter.evaluations, "curve": meter.curve})
            print(config, seed, options, kept["evaluations"][-1], flush=True)
        return kept

    def runs(self) -> list[Run]:
        """Return the stored runs of the same length."""
        return [run for run in self.file.all() if run["limit"] == self.seconds]

    def _train(
        self,
        config: str,
        seed: int,
        options: Options,
        seconds: float,
        evaluation: Evaluation,
        stop: Stop = never,
    ) -> Meter:
        module, data, trainer = build(config, seed, [f"--{name}={value!r}" for name, value in options.items()])
        assert isinstance(module.model, PipelineModel)
        if evaluation not in self._untrained:
            self._untrained[evaluation] = evaluation(module.model)
        milestones = [fraction * seconds for fraction in FRACTIONS]
        meter = Meter(milestones, evaluation, self._untrained[evaluation], stop)
        without_files(meter, max_steps=-1, accelerator="cpu", **trainer).fit(module, data)
        return meter


def commit() -> str:
    """Return the commit of the checkout, or `unknown`."""
    command = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def write(table: Table, level: float) -> str:
    """Write the tables and the curves of the stored runs; return the tables."""
    runs = table.runs()
    page = report.page(runs, level, table.seconds, table.tuning_seconds)
    (table.out / "methods.md").write_text(page)
    report.plot(runs, table.out / "methods.png")
    return page


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=shipped_configs(), default=shipped_configs(), metavar="CONFIG")
    parser.add_argument("--out", type=Path, default=Path("runs/method_table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of a run")
    parser.add_argument("--tuning-seconds", type=float, default=120, help="CPU seconds of all trials of a method")
    parser.add_argument("--level", type=float, default=-0.5, help="mean log p(clean) of emoji64-judge-eval")
    parser.add_argument("--prompts", type=int, default=20, help="evaluation prompts, two images each")
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"))
    parser.add_argument("--report", action="store_true", help="write tables and curves of the stored runs only")
    return parser.parse_args(words)


def main() -> None:
    """Run what is missing, then write tables and curves."""
    arguments = parse()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec|instantiate_classes).*")
    seconds, tuning, images = arguments.seconds, arguments.tuning_seconds, arguments.clean_images
    table = Table(arguments.out, seconds, tuning, images, arguments.prompts)
    for seed in range(0 if arguments.report else arguments.seeds):
        for config in arguments.configs:
            table.run(config, seed)
    print(write(table, arguments.level))


if __name__ == "__main__":
    main()
