"""Write the results as tables and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.method_table.measure import is_valid
from examples.method_table.methods import KINDS, kind
from examples.method_table.runs import Run

IMAGE_LEVEL = -0.25
"""The evaluation at which PSNR is compared; it falls when training goes on after the evaluation is near 0."""
COSTS = {"seconds": "CPU seconds", "queries": "reward queries", "passes": "network passes"}


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by config, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["config"], []).append(run)
    return groups


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def to_reach(run: Run, level: float, key: str = "seconds") -> float:
    """Return the cost or score at which the evaluation first reaches `level`, linear between milestones.

    Infinite if it never does, or only with images that no longer show the caption.
    """
    before = run["evaluations"][0]
    for row in run["evaluations"]:
        if row["evaluation"] >= level and is_valid(row):
            rise = row["evaluation"] - before["evaluation"]
            fraction = 1.0 if rise <= 0 else max(0.0, (level - before["evaluation"]) / rise)
            return float(before[key] + fraction * (row[key] - before[key]))
        before = row
    return math.inf


def at(run: Run, spent: float, key: str, score: str = "evaluation") -> float:
    """Return a score after a cost, by linear interpolation between milestones; NaN if less was spent."""
    rows = run["evaluations"]
    for before, row in zip(rows, rows[1:], strict=False):
        if row[key] >= spent:
            fraction = (spent - before[key]) / (row[key] - before[key])
            return float(before[score] + fraction * (row[score] - before[score]))
    return math.nan


def page(runs: Sequence[Run], level: float, seconds: float, tuning_seconds: float) -> str:
    """Return the leaderboard and the results of each kind of method, with their headings, as Markdown."""
    groups = grouped(runs)
    commits = ", ".join(sorted({f"{run['commit']} ({run['date']})" for run in runs}))
    head = (
        f"{seconds:g} CPU seconds of one thread a run, tuned for {tuning_seconds:g}; commit {commits}. Means over the "
        f"seeds, ± standard error.\n\n### Time to reward\n\n"
    )
    kinds = by_kind(groups).items()
    tables = {"At equal CPU seconds": [f"#### {name.capitalize()}\n\n{results(group)}" for name, group in kinds]}
    for key in ("queries", "passes"):
        tables[f"At equal {COSTS[key]}"] = [f"#### {name.capitalize()}, {equal(group, key)}" for name, group in kinds]
    sections = [part for title, parts in tables.items() for part in (f"### {title}\n", *parts)]
    return "\n".join([f"{head}{leaderboard(groups, level)}", *sections])


def by_kind(groups: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """Divide the runs by kind of method."""
    kinds = {name: {config: runs for config, runs in groups.items() if kind(config) == name} for name in KINDS.values()}
    return {name: group for name, group in kinds.items() if group}


def leaderboard(groups: dict[str, list[Run]], level: float) -> str:
    """Return the cost until the evaluation reaches `level`, one row per config, fastest first; the others by score."""
    rows = []
    for config, group in groups.items():
        reached = {key: [to_reach(run, level, key) for run in group] for key in COSTS}
        number = sum(map(math.isfinite, reached["seconds"]))
        score = _mean(group, "evaluation")
        if number == len(group):
            order = mean_and_error(reached["seconds"])[0]
            cells = [cell(reached["seconds"], 1), *(cell(reached[key], 0) for key in ("queries", "passes"))]
        else:
            order = 1e6 - score
            cells = ["not reached", "", ""]
        tuned = ", ".join(f"{name.split('.')[-1]} {value:.2g}" for name, value in group[0]["options"].items())
        rows.append((order, line([config, kind(config), tuned, f"{number} of {len(group)}", *cells])))
    head = ["config", "kind", "tuned", f"seeds at {level:g}", *(f"{name} to it" for name in COSTS.values())]
    return line(head) + "|---" * len(head) + "|\n" + "".join(row for _, row in sorted(rows))


def results(groups: dict[str, list[Run]]) -> str:
    """Return the cost and every score at the end, PSNR at an equal evaluation, and the gradient norm; best first."""
    names = _scores(groups)
    head = ["config", "steps", "queries", "passes", *names]
    if "PSNR" in names:
        head += [f"PSNR at evaluation {IMAGE_LEVEL:g}"]
    head += ["gradient norm: first → last"]
    lines = []
    for config, group in sorted(groups.items(), key=lambda item: -_mean(item[1], "evaluation")):
        cells = [config, *(f"{_mean(group, key):,.0f}" for key in ("steps", "queries", "passes"))]
        cells += [cell([run["evaluations"][-1][name] for run in group]) for name in names]
        if "PSNR" in names:
            cells += [cell([to_reach(run, IMAGE_LEVEL, "PSNR") for run in group])]
        lines.append(line([*cells, _growth(group)]))
    return line(head) + "|---" * len(head) + "|\n" + "".join(lines)


def equal(groups: dict[str, list[Run]], key: str) -> str:
    """Return every score at the highest cost that all runs have, and that cost as the heading; best first."""
    names = _scores(groups)
    cost = min(run["evaluations"][-1][key] for group in groups.values() for run in group)
    rows = {config: [[at(run, cost, key, name) for run in group] for name in names] for config, group in groups.items()}
    best_first = sorted(rows.items(), key=lambda item: -mean_and_error(item[1][0])[0])
    lines = [line([config, *map(cell, scores)]) for config, scores in best_first]
    table = line(["config", *names]) + "|---" * (1 + len(names)) + "|\n"
    return f"{cost:,.0f} {COSTS[key]}\n\n{table}{''.join(lines)}"


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Return a mean with its standard error as the text of a cell; empty if a value is not finite."""
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return ""
    return f"{mean:,.{digits}f}" + ("" if math.isnan(error) else f" ± {error:,.{digits}f}")


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def _scores(groups: dict[str, list[Run]]) -> list[str]:
    names = next(iter(groups.values()))[0]["evaluations"][0]
    return ["evaluation", *(name for name in names if name not in (*COSTS, "steps", "evaluation"))]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plot the evaluation against each cost, one row per kind of method; error bars are one standard error."""
    groups = grouped(runs)
    kinds = by_kind(groups)
    figure = Figure(figsize=(15, 4 * len(kinds)), layout="constrained")
    rows = figure.subplots(len(kinds), len(COSTS), sharex="col", sharey=True, squeeze=False)
    for (name, group), panels in zip(kinds.items(), rows, strict=True):
        for place, (config, of_config) in enumerate(group.items()):
            for axes, key in zip(panels, COSTS, strict=True):
                _curve(axes, config, of_config, key, ("-", "--", ":", "-.")[place // 10 % 4])
        for axes in panels:
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"{name}\nmean log p(clean), emoji64-judge-eval")
        panels[-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes, label in zip(rows[-1], COSTS.values(), strict=True):
        axes.set_xlabel(label)
    figure.savefig(path, dpi=100)


def _curve(axes: Any, label: str, group: list[Run], key: str, style: str) -> None:
    evaluations = [run["evaluations"] for run in group]
    if len({len(rows) for rows in evaluations}) > 1:  # a long training step passed two milestones in some runs
        evaluations = [[rows[0], rows[-1]] for rows in evaluations]
    milestones = list(zip(*evaluations, strict=True))
    spent = [sum(row[key] for row in rows) / len(rows) for rows in milestones]
    means, errors = zip(*(mean_and_error([row["evaluation"] for row in rows]) for rows in milestones), strict=True)
    bars = [0 if math.isnan(error) else error for error in errors]
    axes.errorbar(spent, means, bars, marker=".", capsize=2, linestyle=style, label=label)


def _growth(group: Sequence[Run]) -> str:
    norms = [[row["gradient_norm"] for row in run["curve"]] for run in group]
    first, last = ([_median(part) for part in parts] for parts in ([n[:5] for n in norms], [n[-5:] for n in norms]))
    return f"{sum(first) / len(first):.3g} → {sum(last) / len(last):.3g}"


def _mean(group: Sequence[Run], key: str) -> float:
    return mean_and_error([run["evaluations"][-1][key] for run in group])[0]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan
