"""Compare all methods on the same model, rewards, prompts and seeds.

    python -m examples.method_table
    python -m examples.method_table --report

Cost is counted in network passes: a pass is one forward or one backward pass of the denoiser over one latent, and
recomputation counts. All methods with a differentiable reward have the same budget; policy gradients and the forward
process have four times as much. Tuning is the same for every method and uses the trained reward: three learning rates
and, if a method has its own parameter (such as the clip of PPO or beta of PRDP), three values of it are run for a
quarter of the budget. The best settings of the two best learning rates are run at full length on another seed, and the
better one is used. Every run is written to `OUT/runs.jsonl` when it ends, so that an interrupted table continues where
it stopped, and `--methods`, `--tasks` and `--seeds` split the work between processes. The table goes to
`OUT/methods.md`, the curves to `OUT/methods-*.png`.
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.memory import MIB
from examples.method_table import report
from examples.method_table.measure import Evaluation, Meter
from examples.method_table.methods import METHODS, TASKS, Setting, Trial
from examples.method_table.runs import Run, RunFile
from examples.trainer import without_files
from lightning_draft.data import PromptDataModule
from lightning_draft.plan import Tracker
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import Prompt

SHORT, FINAL = 1000, 1001
"""Seeds of the short and of the long tuning runs; training seeds are below them."""


class Table:
    """All runs, stored in one file.

    Args:
        setting: Settings that all methods share.
        out: Folder of `runs.jsonl` and of the results.
        budget: Network passes per run.
        evaluation: Number of evaluation prompts, evenly spread over the list, and images per prompt.
    """

    def __init__(self, setting: Setting, out: Path, budget: int, evaluation: tuple[int, int]) -> None:
        self.setting, self.out, self.budget, self.evaluated = setting, out, budget, evaluation
        self.kept = RunFile(out / "runs.jsonl")

    def base(self, task: str) -> dict[str, float]:
        """Return the scores of the base model."""
        kept = self.kept.find(task=task, method="base")
        if kept is None:
            module = METHODS[TASKS[task].methods[0]].build(self.setting, task, Trial(1e-3, 1.0), seed=0)
            evaluation = self._evaluation(task)
            images, _ = evaluation.images(module)
            kept = self.kept.add({"task": task, "method": "base", "scores": evaluation.scores(module, images)})
        return dict(kept["scores"])

    def tuned(self, task: str, method: str, lrs: Sequence[float] | None) -> Trial:
        """Return the tuned setting: the better of two full runs, the best two learning rates of the short runs.

        A task may reuse the setting of another task.
        """
        task = TASKS[task].tuned_on or task

        def ranked(trials: Sequence[Trial], seed: int, fraction: float) -> list[Trial]:
            rewards = {trial: report.last(self.run(task, method, trial, seed, fraction)) for trial in trials}
            return sorted(trials, key=lambda trial: -rewards[trial])

        short = ranked(METHODS[method].trials(lrs), SHORT, 0.25)
        winners = {trial.lr: trial for trial in reversed(short)}
        finalists = [trial for trial in short if trial in winners.values()][:2]
        return ranked(finalists, FINAL, 1.0)[0]

    def run(self, task: str, method: str, trial: Trial, seed: int, fraction: float = 1.0) -> Run:
        """Train, or return the run if it is in the file."""
        kept = self.kept.find(task=task, method=method, **asdict(trial), seed=seed)
        if kept is None:
            budget = fraction * self.budget * METHODS[method].budget * TASKS[task].budget
            kept = self.kept.add(self._train(task, method, trial, seed, round(budget)))
            last = kept["evaluations"][-1]
            print(
                f"{task}, {method}, {METHODS[method].label(trial)}, seed {seed}: "
                f"reward {kept['start']:.4g} -> {last['reward']:.4g} "
                f"with {last['queries']} queries, {last['passes']} passes, {last['seconds']:.0f} s",
                flush=True,
            )
        return kept

    def runs(self, tasks: Sequence[str]) -> list[Run]:
        """Return the stored runs with the tuned settings, in the order of the table."""
        every = [run for run in self.kept.all() if run["method"] != "base"]
        finals = sorted((run for run in every if run["seed"] == FINAL), key=report.last)
        best = {(run["task"], run["method"]): (run["lr"], run["own"]) for run in finals}

        def chosen(run: Run) -> bool:
            source = TASKS[run["task"]].tuned_on or run["task"]
            return run["seed"] < SHORT and best.get((source, run["method"])) == (run["lr"], run["own"])

        def place(run: Run) -> tuple[int, int, int]:
            return list(TASKS).index(run["task"]), list(METHODS).index(run["method"]), run["seed"]

        return sorted((run for run in every if run["task"] in tasks and chosen(run)), key=place)

    def _train(self, task: str, method: str, trial: Trial, seed: int, budget: int) -> dict[str, Any]:
        start = self.base(task)
        module = METHODS[method].build(self.setting, task, trial, seed)
        evaluation = self._evaluation(task)
        with module.model.base():
            images, _ = evaluation.images(module)
        meter = Meter(budget, lambda: evaluation.scores(module, images))
        without_files(meter, max_steps=-1).fit(module, self._prompts(task, method, seed))
        identity = {"task": task, "method": method, **asdict(trial), "seed": seed, "start": start["reward"]}
        spent = {"peak_mib": self._peak(task, method, trial)} if seed == 0 else {}
        return {**identity, **spent, "evaluations": meter.evaluations, "curve": meter.curve}

    def _read(self, task: str) -> list[Prompt]:
        return read_prompts(self.setting.many if TASKS[task].many else self.setting.prompts)

    def _evaluation(self, task: str) -> Evaluation:
        number, images_per_prompt = self.evaluated
        prompts = self._read(task)
        return Evaluation(prompts[:: max(1, len(prompts) // number)][:number], images_per_prompt)

    def _prompts(self, task: str, method: str, seed: int) -> PromptDataModule:
        return PromptDataModule(self._read(task), val_size=0, batch_size=METHODS[method].batch_size, seed=seed)

    def _peak(self, task: str, method: str, trial: Trial) -> float:
        """Return the peak of live tensor memory of one training step in MiB, beyond what existed before it."""
        module = METHODS[method].build(self.setting, task, trial, 0)
        with Tracker() as live:
            without_files(max_steps=1).fit(module, self._prompts(task, method, 0))
        return live.peak / MIB


def write(table: Table, tasks: Sequence[str]) -> str:
    """Write the table and the curves of the stored runs with tuned settings; return the table."""
    runs = table.runs(tasks)
    found = {run["task"] for run in runs}
    page = report.table(runs, {task: table.base(task) for task in found}) + "\n" + report.efficiency(runs)
    (table.out / "methods.md").write_text(page)
    report.plot(runs, table.out)
    return page


def main() -> None:
    """Run what is missing, then write table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--budget", type=int, default=8_000, help="network passes per run")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--lrs", nargs="+", type=float, help="learning rates to tune over; by default those of each method"
    )
    parser.add_argument("--model", default="tests/assets/emoji32")
    parser.add_argument("--clip", default="tests/assets/emoji32-clip")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument(
        "--prompts", default="tests/assets/prompts/emoji32_names.csv", help="prompt list with a column `caption`"
    )
    parser.add_argument(
        "--training-images",
        type=Path,
        default=Path("runs/emoji/emoji32.npz"),
        help="training images, for the nearest-image accuracy",
    )
    parser.add_argument(
        "--many", default="tests/assets/prompts/emoji32_all_names.csv", help="prompt list of the task `many`"
    )
    parser.add_argument(
        "--captions", default="tests/assets/prompts/emoji32.txt", help="candidate captions of the reward"
    )
    parser.add_argument("--evaluated", type=int, default=46, help="number of evaluation prompts")
    parser.add_argument("--images-per-prompt", type=int, default=3, help="evaluation images per prompt")
    parser.add_argument(
        "--report", action="store_true", help="write table and plots from the stored runs without training"
    )
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(many workers|eval mode|treespec).*")
    setting = Setting(
        arguments.model,
        arguments.clip,
        arguments.prompts,
        arguments.many,
        arguments.captions,
        arguments.sampling_steps,
        str(arguments.training_images) if arguments.training_images.exists() else None,
    )
    table = Table(setting, arguments.out, arguments.budget, (arguments.evaluated, arguments.images_per_prompt))
    for seed in [] if arguments.report else arguments.seeds:
        for task in arguments.tasks:
            for method in TASKS[task].methods:
                if method in arguments.methods:
                    table.run(task, method, table.tuned(task, method, arguments.lrs), seed)
    print(write(table, arguments.tasks))


if __name__ == "__main__":
    main()
