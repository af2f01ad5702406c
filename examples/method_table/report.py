"""Write the results as tables and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.method_table.runs import Run

BEST = ("reward", "nearest")
AXES = {"queries": "reward queries", "forwards": "network forwards", "seconds": "seconds of training"}


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group runs by (task, method), in order of appearance."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"]), []).append(run)
    return groups


def last(run: Run) -> float:
    """Return the reward at the last evaluation of a run."""
    return float(run["evaluations"][-1]["reward"])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def table(runs: Sequence[Run], base: dict[str, dict[str, float]]) -> str:
    """Return Markdown: one section per task, one row per method; means over seeds and standard errors of the reward."""
    lines: list[str] = []
    for task in dict.fromkeys(run["task"] for run in runs):
        start = base[task]
        others = [name for name in start if name not in ("reward", "diversity", "drift")]
        head = [
            "method",
            "lr",
            "own",
            "steps",
            "passes",
            "queries",
            "seconds",
            "reward",
            *others,
            "diversity",
            "drift",
            "MiB",
        ]
        lines += [f"### {task}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        cells = ["base", *[""] * 6, *(_short(start[key]) for key in ("reward", *others, "diversity")), "", ""]
        lines.append(f"| {' | '.join(cells)} |")
        for (name, method), group in grouped(runs).items():
            if name == task:
                lines.append(_row(method, group, others))
        lines.append("")
    return "\n".join(lines)


def to_reach(run: Run, level: float, key: str = "queries") -> float:
    """Return the cost at which the evaluated reward first reaches `level`, by linear interpolation between milestones.

    Infinite if it never does. `run["start"]` is the reward of the base model, at cost 0.
    """
    before = (0.0, run["start"])
    for row in run["evaluations"]:
        here = (row[key], row["reward"])
        if here[1] >= level:
            rise = here[1] - before[1]
            fraction = 1.0 if rise <= 0 else max(0.0, (level - before[1]) / rise)
            return before[0] + fraction * (here[0] - before[0])
        before = here
    return math.inf


def efficiency(runs: Sequence[Run], fraction: float = 0.5, window: int = 10, rival: str = "PPO") -> str:
    """Return Markdown, one row per method: the cost of learning.

    - medians over seeds of queries, passes and steps to reach `fraction` of the best method's gain on the evaluation;
    - the total queries of the `rival`, divided by those that the method needs to reach the rival's mean final reward;
    - medians of the norm of the gradient over the first `window` steps, before clipping, and of the training reward
      after as many optimization steps as the shortest run has, a mean over `window` steps;
    - the best mean over seeds at any milestone, of the reward and of the nearest-image accuracy; biased upward, as a
      maximum of noisy values.
    """
    lines: list[str] = []
    for task in dict.fromkeys(run["task"] for run in runs):
        groups = {method: group for (name, method), group in grouped(runs).items() if name == task}
        start = next(iter(groups.values()))[0]["start"]
        level = start + fraction * (max(_mean_last(group) for group in groups.values()) - start)
        steps = min(len(run["curve"]) for group in groups.values() for run in group)
        head = [
            "method",
            f"queries to {level:.3g}",
            "passes to it",
            "steps to it",
            f"{rival}'s queries / own to its end",
        ]
        head += ["first gradient norm", f"reward at step {steps}", "best reward", "best nearest"]
        lines += [f"### {task}: cost of learning", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for method, group in groups.items():
            reached = [_median([to_reach(run, level, key) for run in group]) for key in ("queries", "passes", "steps")]
            norm = _median([row["gradient_norm"] for run in group for row in run["curve"][:window]])
            late = _median([_mean(run["curve"][max(0, steps - window) : steps], "reward") for run in group])
            cells = [method, *("not reached" if math.isinf(x) else f"{x:.0f}" for x in reached)]
            cells += [_advantage(group, groups.get(rival, [])), _short(norm), _short(late)]
            cells += [_short(best(group, key)) if key in group[0]["evaluations"][0] else "" for key in BEST]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def best(group: Sequence[Run], key: str) -> float:
    """Return the greatest mean over seeds at any milestone."""
    return max(mean_and_error([row[key] for row in rows])[0] for rows in zip(*_evaluations(group), strict=False))


def _advantage(group: Sequence[Run], rivals: Sequence[Run]) -> str:
    """Return the rivals' total queries divided by the queries needed to reach their final reward."""
    if not rivals:
        return ""
    spent = _median([run["evaluations"][-1]["queries"] for run in rivals])
    needed = _median([to_reach(run, _mean_last(rivals)) for run in group])
    return "not reached" if math.isinf(needed) else f"{spent / needed:.1f}"


def _mean_last(group: Sequence[Run]) -> float:
    return mean_and_error([last(run) for run in group])[0]


def _evaluations(group: Sequence[Run]) -> list[list[dict[str, float]]]:
    return [run["evaluations"] for run in group]


def plot(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write one PNG per task: evaluated reward against queries, network forwards and seconds."""
    files = []
    for task in dict.fromkeys(run["task"] for run in runs):
        figure = Figure(figsize=(15, 5), layout="constrained")
        panels = figure.subplots(1, len(AXES), sharey=True)
        groups = {method: group for (name, method), group in grouped(runs).items() if name == task}
        for place, (method, group) in enumerate(groups.items()):
            for axes, key in zip(panels, AXES, strict=True):
                _curve(axes, method, group, key, "-" if place < 10 else "--")
        for axes, label in zip(panels, AXES.values(), strict=True):
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"{task}: reward on fresh noise")
        panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        files.append(folder / f"methods-{task}.png")
        figure.savefig(files[-1], dpi=100)
    return files


def _curve(axes: Any, method: str, group: list[Run], key: str, line: str) -> None:
    """Plot the mean over seeds at each milestone, with error bars of one standard error."""
    milestones = list(zip(*_evaluations(group), strict=False))
    spent = [sum(row[key] for row in rows) / len(rows) for rows in milestones]
    means, errors = zip(*(mean_and_error([row["reward"] for row in rows]) for rows in milestones), strict=True)
    axes.errorbar(
        spent, means, [0 if math.isnan(e) else e for e in errors], marker=".", capsize=2, linestyle=line, label=method
    )


def _row(method: str, group: list[Run], others: Sequence[str]) -> str:
    ends = [run["evaluations"][-1] for run in group]

    def mean(key: str) -> float:
        return mean_and_error([row[key] for row in ends])[0]

    reward, error = mean_and_error([row["reward"] for row in ends])
    peak = next((run["peak_mib"] for run in group if "peak_mib" in run), None)
    cells = [
        method,
        f"{group[0]['lr']:g}",
        "" if group[0]["own"] is None else f"{group[0]['own']:g}",
        *(f"{mean(key):.0f}" for key in ("steps", "passes", "queries", "seconds")),
        _short(reward) + ("" if math.isnan(error) else f" ± {error:.2g}"),
        *(_short(mean(key)) for key in (*others, "diversity", "drift")),
        "" if peak is None else f"{peak:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan


def _mean(rows: Sequence[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows) if rows else math.nan


def _short(value: float) -> str:
    return f"{value:.3g}"
