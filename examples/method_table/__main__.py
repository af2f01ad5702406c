"""Every method on the same model, rewards, prompts and seeds.

    python -m examples.method_table
    python -m examples.method_table --report

Cost is counted in network passes: one is one forward or one backward pass of the denoiser over one latent, and
recomputation counts. All direct methods spend the same; policy gradients spend twice as much. Learning rates are
chosen first, for every method alike: the best of `--lrs` after a quarter of the budget, on a seed of its own. Every run
is kept as a file as soon as it has ended, so an interrupted table goes on where it stopped, and `--methods` and
`--seeds` share the work among processes. The table goes to `OUT/methods.md`, the curves to `OUT/methods-*.png`.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.memory import MIB, LiveBytes
from examples.method_table import report
from examples.method_table.measure import Evaluation, Meter
from examples.method_table.methods import METHODS, TASKS, Setting
from lightning_draft.data import PromptDataModule, read_prompts
from lightning_draft.modules import RewardModule

TUNING_SEED = 1000


class Table:
    """All runs, each kept in a file.

    Args:
        setting: What all methods share.
        out: Folder of the runs.
        budget: Network passes a run.
        evaluation: Pictures are evaluated of every so manyth prompt, and so many of each, from noise of their own.
    """

    def __init__(self, setting: Setting, out: Path, budget: int, evaluation: tuple[int, int]) -> None:
        self.setting, self.out, self.budget = setting, out, budget
        self.prompts = read_prompts(setting.prompts)
        every, draws = evaluation
        self.evaluation = Evaluation(self.prompts[::every], draws)
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def base(self, task: str) -> dict[str, float]:
        """What the model reaches before any training."""
        file = self.out / "runs" / f"{task}-base.json"
        if not file.exists():
            module = METHODS[TASKS[task].methods[0]].build(self.setting, task, lr=1e-3, seed=0)
            images, _ = self.evaluation.pictures(module)
            file.write_text(json.dumps(self.evaluation.scores(module, images)))
        return json.loads(file.read_text())

    def learning_rate(self, task: str, method: str, lrs: Sequence[float]) -> float:
        """The best of `lrs` after a quarter of the budget."""
        gains = {lr: self.run(task, method, lr, TUNING_SEED, 0.25)["evaluations"][-1]["reward"] for lr in lrs}
        return max(gains, key=lambda lr: gains[lr])

    def run(self, task: str, method: str, lr: float, seed: int, share: float = 1.0) -> report.Run:
        """Train once, or read what was kept of it."""
        file = self.out / "runs" / f"{task}-{method}-lr{lr:g}-seed{seed}.json"
        if not file.exists():
            result = self._train(task, method, lr, seed, round(share * self.budget * METHODS[method].budget))
            file.write_text(json.dumps(result))
            last = result["evaluations"][-1]
            print(
                f"{file.stem}: reward {result['start']:.4g} -> {last['reward']:.4g} with {last['queries']} queries, "
                f"{last['passes']} passes, {last['seconds']:.0f} s",
                flush=True,
            )
        return json.loads(file.read_text())

    def _train(self, task: str, method: str, lr: float, seed: int, budget: int) -> dict[str, Any]:
        start = self.base(task)
        module = METHODS[method].build(self.setting, task, lr, seed)
        pictures = self._base_pictures(module)
        meter = Meter(budget, lambda: self.evaluation.scores(module, pictures))
        trainer(-1, [meter]).fit(module, self._prompts(method, seed))
        identity = {"task": task, "method": method, "lr": lr, "seed": seed, "start": start["reward"]}
        spent = {"peak_mib": self._peak(task, method, lr)} if seed == 0 else {}
        return {**identity, **spent, "evaluations": meter.evaluations, "curve": meter.curve}

    def _base_pictures(self, module: RewardModule) -> Any:
        with module.model.base():
            return self.evaluation.pictures(module)[0]

    def _prompts(self, method: str, seed: int) -> PromptDataModule:
        return PromptDataModule(self.prompts, val_size=0, batch_size=METHODS[method].batch_size, seed=seed)

    def _peak(self, task: str, method: str, lr: float) -> float:
        """MiB that live tensors take at most in a training step, beyond what is there before it."""
        module = METHODS[method].build(self.setting, task, lr, 0)
        with LiveBytes() as live:
            trainer(1, []).fit(module, self._prompts(method, 0))
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
    """Write the table and the curves of the runs that are there, at the learning rates chosen; return the table."""
    every = [json.loads(file.read_text()) for file in (table.out / "runs").glob("*-seed*.json")]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for run in every:
        if run["seed"] == TUNING_SEED:
            key, found = (run["task"], run["method"]), (run["evaluations"][-1]["reward"], run["lr"])
            best[key] = max(best.get(key, found), found)
    runs = [run for run in every if run["seed"] != TUNING_SEED and run["task"] in tasks]
    runs = [run for run in runs if best[run["task"], run["method"]][1] == run["lr"]]
    runs.sort(key=lambda run: (list(TASKS).index(run["task"]), list(METHODS).index(run["method"]), run["seed"]))
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
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument("--prompts", default="emoji_names", help="with a column `caption`: what is to be drawn")
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji/emoji32.npz"), help="for `nearest`, if there")
    parser.add_argument("--captions", default="emoji", help="what the CLIP tells prompts from")
    parser.add_argument("--every", type=int, default=2, help="evaluate on every so manyth prompt")
    parser.add_argument("--draws", type=int, default=3, help="evaluation pictures a prompt")
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(many workers|eval mode|treespec).*")
    setting = Setting(
        arguments.model,
        arguments.clip,
        arguments.prompts,
        arguments.captions,
        arguments.sampling_steps,
        str(arguments.pictures) if arguments.pictures.exists() else None,
    )
    table = Table(setting, arguments.out, arguments.budget, (arguments.every, arguments.draws))
    for seed in [] if arguments.report else arguments.seeds:
        for task in arguments.tasks:
            for method in TASKS[task].methods:
                if method in arguments.methods:
                    table.run(task, method, table.learning_rate(task, method, arguments.lrs), seed)
    print(write(table, arguments.tasks))


if __name__ == "__main__":
    main()
