"""Table and figure of an experiment."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.emoji_model.evaluate import mean_and_error
from examples.method_table.runs import Run


def labels(runs: list[Run]) -> list[str]:
    """Return the settings in the order in which the experiment lists them."""
    return list(dict.fromkeys(run["setting"] for run in sorted(runs, key=lambda run: (run["seed"], run["order"]))))


def evaluations(runs: list[Run], label: str) -> Tensor:
    """Return the evaluations of a setting, `(seeds, milestones, columns)`."""
    return torch.tensor([[list(row.values()) for row in run["evaluations"]] for run in runs if run["setting"] == label])


def norms(runs: list[Run], label: str) -> list[Tensor]:
    """Return the gradient norms of a setting by step, one tensor a seed."""
    return [torch.tensor([row["gradient_norm"] for row in r["curve"]]) for r in runs if r["setting"] == label]


def growth(runs: list[Run], label: str) -> str:
    """Return the median gradient norm of the first five and last five steps, and the largest; means over the seeds."""
    found = torch.tensor([[n[:5].median(), n[-5:].median(), n.max()] for n in norms(runs, label)]).mean(0)
    return " → ".join(f"{value:.3g}" for value in found[:2]) + f"; {found[2]:.3g}"


def change(values: Tensor) -> str:
    """Return the first and last of values `(seeds, milestones)`, with the standard error if there are several seeds."""
    mean, error = mean_and_error(values[:, -1])
    return f"{values[:, 0].mean():.2f} → {mean:.2f}" + (f" ± {error:.2f}" if len(values) > 1 else "")


def table(runs: list[Run]) -> str:
    """Return the first and last evaluation of each setting as markdown, with standard errors over the seeds."""
    columns = list(runs[0]["evaluations"][0])[2:]
    lines = ["| setting | steps | " + " | ".join(columns) + " | gradient norm: first → last; largest |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for label in labels(runs):
        values = evaluations(runs, label)
        cells = [change(values[:, :, k]) for k in range(2, 2 + len(columns))]
        lines.append(
            f"| {label} | {values[:, -1, 1].mean():.0f} | " + " | ".join(cells) + f" | {growth(runs, label)} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: list[Run], path: Path) -> None:
    """Plot rewards and PSNR by CPU seconds, with standard errors over the seeds, and the gradient norm by step."""
    columns = list(runs[0]["evaluations"][0])
    shown = [name for name in ("reward", "evaluation", "PSNR") if name in columns]
    figure = Figure(figsize=(4.3 * (len(shown) + 1), 3.8), layout="constrained")
    *axes, gradients = figure.subplots(1, len(shown) + 1)
    for label in labels(runs):
        values = evaluations(runs, label)
        for axis, name in zip(axes, shown, strict=True):
            score = values[..., columns.index(name)]
            error = score.std(0) / len(score) ** 0.5 if len(score) > 1 else None
            axis.errorbar(values[..., 0].mean(0), score.mean(0), error, marker=".", label=label)
            axis.set(xlabel="CPU seconds of training", ylabel=name)
        gradients.semilogy(norms(runs, label)[0], label=label)
    gradients.set(xlabel="training step (seed 0)", ylabel="gradient norm")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
