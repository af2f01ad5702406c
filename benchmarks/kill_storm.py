"""Kill and resume training runs repeatedly, and compare their results with those of an uninterrupted run.

    python -m benchmarks.kill_storm --kills 200

Each trial runs `lightning-draft fit --config METHOD.yaml --name run --resume auto` in a separate process. It trains a
tiny random pipeline on a `ZScoreSum`: adapters by DRaFT (`direct`), all weights by DRaFT (`full`), or adapters by LOOP
with two inner epochs (`loop`), with a moving average, the guard, samples, exported files and checkpoints. The process
is stopped one to five times and restarted each time. It is stopped by SIGKILL, SIGTERM, or one or two SIGINT, after a
random time or at a chosen point (see `kill_moments`), or by a full disk. At the end all files, logged values and images
must be bitwise equal.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.common import quiet, write_pipeline
from benchmarks.kill_moments import SIGNALS, Kill, choose
from benchmarks.launcher import PATIENCE_S, Attempt, Launcher
from benchmarks.run_differences import differences

STEPS = 7
KINDS = (*SIGNALS, *SIGNALS, "disk full", "file limit")
_MOST_KILLS = 5  # of one run
_CAUGHT = {2, 130, 143}  # exit statuses of a process that was not ended directly by a signal

_DRAFT = """\
  class_path: DraftModule
  init_args:
    truncation: {{class_path: LastK, init_args: {{k: 1}}}}
    sampler: {{class_path: DDIM, init_args: {{num_steps: 2}}}}
"""
_METHODS = {
    "direct": _DRAFT,
    "full": _DRAFT,
    "loop": """\
  class_path: PolicyGradientModule
  init_args:
    objective: {{class_path: PPO, init_args: {{clip: 0.3}}}}
    advantage_estimator: LeaveOneOut
    samples_per_prompt: 2
    inner_epochs: 2
    sampler: {{class_path: DDIM, init_args: {{num_steps: 2, eta: 1.0}}}}
""",
}
_COMMON = """\
    model:
      class_path: StableDiffusion
      init_args: {{pretrained: {model}, guidance: {{scale: 1.0}}, {trained}}}
    reward:
      class_path: ZScoreSum
      init_args:
        rewards:
          light: {{reward: Brightness}}
          sharp: {{reward: Sharpness, weight: -0.5}}
    eval_rewards: {{bright: Brightness}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data: {{prompts: [cat, dog, sun, moon, tree, car, house, fish, bird, book], batch_size: 2, val_size: 3}}
trainer: {{max_steps: {steps}, accelerator: cpu, val_check_interval: 2}}
samples: {{every_n_steps: 3, max_samples: 1, min_size: 16}}
export: {{every_n_steps: 3}}
gradients: {{min_history: 2, figure_every_n_steps: 0}}
checkpoint: {{every_n_steps: 3}}
progress: null
ema: {{class_path: AdapterEMA, init_args: {{decay: 0.5}}}}
guard: {{class_path: OverOptimizationGuard, init_args: {{action: {action}, margin: 0.0, max_prompts: 1, samples_per_prompt: 2}}}}
"""  # noqa: E501
METHODS = tuple(_METHODS)


@dataclass
class Outcome:
    """The result of all trials.

    Attributes:
        kills: Number of kills by kind.
        runs: Number of runs that were killed and resumed until they finished.
        runs_that_differ: Number of these runs that failed or differ from the uninterrupted run.
        faults: Differences, with the trial.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    runs_that_differ: int = 0
    faults: list[str] = field(default_factory=list)


def storm(root: Path, kills: int, seed: int = 0, methods: tuple[str, ...] = METHODS) -> Outcome:
    """Run trials, alternating between the methods, until there were `kills` kills.

    Args:
        root: An empty folder for the runs.
        kills: Number of kills.
        seed: Seed of kinds and moments.
        methods: Some of `METHODS`.
    """
    launchers = {method: Launcher(_arguments(root, method)) for method in methods}
    try:
        return _storm(root, launchers, kills, random.Random(seed))
    finally:
        for launcher in launchers.values():
            launcher.close()


def replay(root: Path, method: str, kills: list[Kill]) -> list[str]:
    """Kill and resume one run at given points, and return its differences from an uninterrupted run.

    Args:
        root: An empty folder for the runs.
        method: One of `METHODS`.
        kills: The kills, in order; a kill that is not reached is a difference.
    """
    launcher, whole = Launcher(_arguments(root, method)), root / "whole"
    try:
        if launcher.attempt(Attempt(whole)) != 0:
            return [f"the uninterrupted run fails, see {whole}/log.txt"]
        found, done = _trial(launcher, [Attempt(root / "killed", kill) for kill in kills], whole)
        return found + [f"not reached: {kill}" for kill in kills[done:]]
    finally:
        launcher.close()


def _storm(root: Path, launchers: dict[str, Launcher], kills: int, generator: random.Random) -> Outcome:
    started = time.monotonic()
    for method, launcher in launchers.items():
        if launcher.attempt(Attempt(root / "whole" / method)) != 0:
            return Outcome(faults=[f"{method}: the uninterrupted run fails, see {root}/whole/{method}/log.txt"])
    duration = (time.monotonic() - started) / len(launchers)
    outcome, kinds = Outcome(), _shuffled(generator, kills)
    while kinds:
        method = list(launchers)[outcome.runs % len(launchers)]
        number = min(len(kinds), generator.randint(1, _MOST_KILLS))
        plan = [choose(generator, kinds.pop(), count == 0, method == "loop") for count in range(number)]
        attempts = [Attempt(root / f"{outcome.runs:03}", kill, generator.uniform(0.0, duration)) for kill in plan]
        found, done = _trial(launchers[method], attempts, root / "whole" / method)
        kinds[:0] = [kill.how for kill in plan[done:]]
        outcome.kills.update(kill.how for kill in plan[:done])
        outcome.runs += 1
        outcome.runs_that_differ += bool(found)
        missed = f" (not reached: {plan[done]})" if done < len(plan) else ""
        label = f"{method} {outcome.runs - 1:03}: {', then '.join(map(str, plan[:done])) or 'not killed'}{missed}"
        outcome.faults += [f"{label}: {each}" for each in found]
        print(f"{sum(outcome.kills.values())}/{kills} {label}: {'; '.join(found) or 'identical'}", flush=True)
        if not found:
            shutil.rmtree(attempts[0].folder)
    return outcome


def _trial(launcher: Launcher, attempts: list[Attempt], whole: Path) -> tuple[list[str], int]:
    """Kill a run as planned, resume it until it finishes, and return the differences and the number of kills."""
    done = 0
    for attempt in attempts:
        status = launcher.attempt(attempt)
        if status is None:
            return [f"still running after {PATIENCE_S:g} s"], done + 1
        if status == 0:
            break  # the point was not reached
        done += 1
        if status > 0 and status not in _CAUGHT:
            return [f"exit status {status}"], done
    else:
        status = launcher.attempt(Attempt(attempts[0].folder))
    if status != 0:
        return [f"exit status {status} of the resumed run"], done
    return differences(attempts[0].folder / "runs" / "run", whole / "runs" / "run"), done


def _arguments(root: Path, method: str) -> list[str]:
    """Write the pipeline and the config of the method, and return the command that starts and resumes a run."""
    if not (root / "model").exists():
        write_pipeline(root / "model", "tiny")
    config = root / f"{method}.yaml"
    trained = "trainable: full" if method == "full" else "lora: {rank: 1, target_modules: [to_q]}"
    action = "warn" if method == "full" else "shrink"
    text = f"model:\n{_METHODS[method]}{_COMMON}"
    config.write_text(text.format(model=root / "model", steps=STEPS, trained=trained, action=action))
    return ["fit", "--config", str(config), "--name", "run", "--resume", "auto"]


def _shuffled(generator: random.Random, number: int) -> list[str]:
    """Return a number of kinds of kills in random order, with about the same number of each."""
    kinds = [KINDS[index % len(KINDS)] for index in range(number)]
    generator.shuffle(kinds)
    return kinds


def main() -> int:
    """Run the trials and print the differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="total number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments")
    parser.add_argument("--method", choices=METHODS, action="append", help="by default all, in turn")
    parser.add_argument("--folder", type=Path, help="folder for runs that differ; by default a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.folder or Path(temporary)).resolve()
        outcome = storm(root, arguments.kills, arguments.seed, tuple(arguments.method or METHODS))
    print("\n".join(outcome.faults))
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(outcome.kills.items()))
    same = outcome.runs - outcome.runs_that_differ
    print(f"{sum(outcome.kills.values())} kills ({kinds}) of {outcome.runs} runs; {same} of {outcome.runs} identical")
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
