"""Every method on the same model, rewards, prompts and seeds.

    python -m examples.method_table
    python -m examples.method_table --report

Cost is counted in network passes: one is one forward or one backward pass of the denoiser over one latent, and
recomputation counts. All direct methods spend the same; policy gradients spend four times as much. Settings are
chosen first, for every method alike, by the trained reward: three learning rates and, where a method has a parameter of
its own (PPO's and LOOP's clip, PRDP's beta), three values of that with each of them are tried for a quarter of the
budget; the best of the best two learning rates go on to a run at full length on another seed, and the better of these
is chosen. Every run is written to `OUT/runs.jsonl` when it ends, so an interrupted table continues where it
stopped, and `--methods`, `--tasks` and `--seeds` share the work among processes. The table goes to `OUT/methods.md`,
the curves to `OUT/methods-*.png`.
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.memory import MIB, LiveBytes
from examples.method_table import report
from examples.method_table.measure import Evaluation, Meter
from examples.method_table.methods import METHODS, TASKS, Setting, Trial
from examples.method_table.runs import Run, RunFile
from lightning_draft.data import PromptDataModule
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import Prompt

HEAT, FINAL = 1000, 1001
"""Seeds of the short and of the long tuning runs; training seeds are below them."""


class Table:
    """All runs, kept in one file.

    Args:
        setting: What all methods share.
        out: Folder of `runs.jsonl` and of the results.
        budget: Network passes a run.
        evaluation: How many prompts are evaluated, evenly spread over all, and how many pictures of each, from noise of
            their own.
    """

    def __init__(self, setting: Setting, out: Path, budget: int, evaluation: tuple[int, int]) -> None:
        self.setting, self.out, self.budget, self.evaluated = setting, out, budget, evaluation
        self.kept = RunFile(out / "runs.jsonl")

    def base(self, task: str) -> dict[str, float]:
        """What the model reaches before any training."""
        kept = self.kept.find(task=task, method="base")
        if kept is None:
            module = METHODS[TASKS[task].methods[0]].build(self.setting, task, Trial(1e-3, 1.0), seed=0)
            evaluation = self._evaluation(task)
            images, _ = evaluation.pictures(module)
            kept = self.kept.add({"task": task, "method": "base", "scores": evaluation.scores(module, images)})
        return dict(kept["scores"])

    def tuned(self, task: str, method: str, lrs: Sequence[float] | None) -> Trial:
        """The best of two at full length, which are the best after a quarter, but of different learning rates.

        A task may take over another's choice.
        """
        task = TASKS[task].tuned_on or task

        def ranked(trials: Sequence[Trial], seed: int, share: float) -> list[Trial]:
            rewards = {trial: report.last(self.run(task, method, trial, seed, share)) for trial in trials}
            return sorted(trials, key=lambda trial: -rewards[trial])

        heat = ranked(METHODS[method].trials(lrs), HEAT, 0.25)
        winners = {trial.lr: trial for trial in reversed(heat)}
        finalists = [trial for trial in heat if trial in winners.values()][:2]
        return ranked(finalists, FINAL, 1.0)[0]

    def run(self, task: str, method: str, trial: Trial, seed: int, share: float = 1.0) -> Run:
        """Train once, or return the run that is in the file."""
        kept = self.kept.find(task=task, method=method, **asdict(trial), seed=seed)
        if kept is None:
            budget = share * self.budget * METHODS[method].budget * TASKS[task].budget
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
        """Those of the kept runs that were made with the chosen settings, in the table's order."""
        every = [run for run in self.kept.all() if run["method"] != "base"]
        finals = sorted((run for run in every if run["seed"] == FINAL), key=report.last)
        best = {(run["task"], run["method"]): (run["lr"], run["own"]) for run in finals}

        def chosen(run: Run) -> bool:
            source = TASKS[run["task"]].tuned_on or run["task"]
            return run["seed"] < HEAT and best.get((source, run["method"])) == (run["lr"], run["own"])

        def place(run: Run) -> tuple[int, int, int]:
            return list(TASKS).index(run["task"]), list(METHODS).index(run["method"]), run["seed"]

        return sorted((run for run in every if run["task"] in tasks and chosen(run)), key=place)

    def _train(self, task: str, method: str, trial: Trial, seed: int, budget: int) -> dict[str, Any]:
        start = self.base(task)
        module = METHODS[method].build(self.setting, task, trial, seed)
        evaluation = self._evaluation(task)
        with module.model.base():
            pictures, _ = evaluation.pictures(module)
        meter = Meter(budget, lambda: evaluation.scores(module, pictures))
        trainer(-1, [meter]).fit(module, self._prompts(task, method, seed))
        identity = {"task": task, "method": method, **asdict(trial), "seed": seed, "start": start["reward"]}
        spent = {"peak_mib": self._peak(task, method, trial)} if seed == 0 else {}
        return {**identity, **spent, "evaluations": meter.evaluations, "curve": meter.curve}

    def _read(self, task: str) -> list[Prompt]:
        return read_prompts(self.setting.many if TASKS[task].many else self.setting.prompts)

    def _evaluation(self, task: str) -> Evaluation:
        number, draws = self.evaluated
        prompts = self._read(task)
        return Evaluation(prompts[:: max(1, len(prompts) // number)][:number], draws)

    def _prompts(self, task: str, method: str, seed: int) -> PromptDataModule:
        return PromptDataModule(self._read(task), val_size=0, batch_size=METHODS[method].batch_size, seed=seed)

    def _peak(self, task: str, method: str, trial: Trial) -> float:
        """MiB that live tensors take at most in a training step, beyond what is there before it."""
        module = METHODS[method].build(self.setting, task, trial, 0)
        with LiveBytes() as live:
            trainer(1, []).fit(module, self._prompts(task, method, 0))
        return live.peak / MIB


def trainer(max_steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    """A Trainer that writes nothing."""
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )


def write(table: Table, tasks: Sequence[str]) -> str:
    """Write the table and the curves of the runs that are there, with the settings chosen; return the table."""
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
    parser.add_argument("--budget", type=int, default=8_000, help="network passes a run")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, help="instead of each method's own three")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument("--prompts", default="emoji_names", help="with a column `caption`: what is to be drawn")
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji/emoji32.npz"), help="for `nearest`, if there")
    parser.add_argument("--many", default="emoji_all_names", help="the same, for the task on many prompts")
    parser.add_argument("--captions", default="emoji", help="what the CLIP tells prompts from")
    parser.add_argument("--evaluated", type=int, default=46, help="evaluate on so many prompts, evenly spread")
    parser.add_argument("--draws", type=int, default=3, help="evaluation pictures a prompt")
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
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
        str(arguments.pictures) if arguments.pictures.exists() else None,
    )
    table = Table(setting, arguments.out, arguments.budget, (arguments.evaluated, arguments.draws))
    for seed in [] if arguments.report else arguments.seeds:
        for task in arguments.tasks:
            for method in TASKS[task].methods:
                if method in arguments.methods:
                    table.run(task, method, table.tuned(task, method, arguments.lrs), seed)
    print(write(table, arguments.tasks))


if __name__ == "__main__":
    main()
