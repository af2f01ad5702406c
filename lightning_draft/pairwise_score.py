"""Compare two folders of images with a judge that sees both images of each pair."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightning_draft.files import atomic_path
from lightning_draft.image_files import read_image
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.score_pairs import (
    Interval,
    Pair,
    bootstrap_intervals,
    pair_images,
    resampled_units,
    win_rate_interval,
)
from lightning_draft.score_table import ScoredImage

PAIRS_PER_CALL = 64


@dataclass(frozen=True)
class PairwiseComparison:
    """The preferences of a judge on pairs of images; the interval is a 95 % confidence interval.

    Args:
        judge: Name of the judge.
        pairs: Number of pairs.
        win_rate: Mean preference for the image of the second folder; 0.5 if the folders are equally good.
        interval: Its bootstrap interval.
    """

    judge: str
    pairs: int
    win_rate: float
    interval: Interval


def compare_pairs(
    folders: Sequence[str | Path],
    rows: Sequence[Sequence[ScoredImage]],
    judges: Mapping[str, PairwiseReward],
    output: str | Path | None = None,
) -> list[PairwiseComparison]:
    """Ask judges which image of each pair is better; pairs are formed as in `compare`.

    The images of `PAIRS_PER_CALL` pairs are in memory at a time, and a judge sees as many pairs per call.

    Args:
        folders: The two folders.
        rows: The images of each folder, from `score_folder`.
        judges: Judges by name.
        output: Folder for `pairs_<name>.csv` with the preference for the second image of each pair; None to write
            nothing.

    Raises:
        ConfigurationError: There are no pairs.
    """
    pairs = pair_images(*rows)
    units, _ = resampled_units(pairs)
    found = []
    for name, judge in judges.items():
        chunks = [pairs[start : start + PAIRS_PER_CALL] for start in range(0, len(pairs), PAIRS_PER_CALL)]
        wins = np.concatenate([_preferences(folders, chunk, judge) for chunk in chunks])
        if output is not None:
            _write(Path(output) / f"pairs_{name}.csv", pairs, wins)
        interval = win_rate_interval(wins, units, *bootstrap_intervals([wins], units))
        found.append(PairwiseComparison(name, len(pairs), float(wins.mean()), interval))
    return found


def report_pairs(comparisons: Sequence[PairwiseComparison], first: str, second: str) -> str:
    """Write pairwise comparisons as a Markdown table."""
    lines = [
        f"# {second} against {first}, side by side",
        "",
        "| judge | pairs | win rate | interval |",
        "|---|--:|--:|---|",
    ]
    lines += [
        f"| {c.judge} | {c.pairs} | {c.win_rate:.1%} | {c.interval[0]:.1%} to {c.interval[1]:.1%} |"
        for c in comparisons
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def _preferences(folders: Sequence[str | Path], pairs: Sequence[Pair], judge: PairwiseReward) -> np.ndarray:
    """Return the preferences `(B,)` for the second images."""
    first, second = (
        [read_image(Path(folder) / pair[side].file) for pair in pairs] for side, folder in enumerate(folders)
    )
    wins: np.ndarray = judge.prefer(second, first, [pair[0].prompt for pair in pairs]).double().numpy()
    return wins


def _write(path: Path, pairs: Sequence[Pair], wins: np.ndarray) -> None:
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["first", "second", "prompt", "preference_for_second"])
        writer.writerows([a.file, b.file, a.prompt, repr(float(win))] for (a, b), win in zip(pairs, wins, strict=True))
