"""Contact sheets of scored images, and the comparison of two folders with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lightning_draft.image_files import read_image
from lightning_draft.score_pairs import Interval, bootstrap_intervals, pair_images, resampled_units, win_rate_interval
from lightning_draft.score_table import ScoredImage


@dataclass(frozen=True)
class Comparison:
    """The scores of one reward on pairs of images `(a_i, b_i)`; intervals are 95 % confidence intervals.

    Args:
        reward: Name of the reward.
        pairs: Number of pairs.
        sampled: What the bootstrap samples, such as `40 prompts`; see `resampled_units`.
        unpaired: Number of images of the first and of the second folder without a counterpart.
        mean_a: Mean score of the first folder.
        mean_b: Mean score of the second folder.
        difference: Mean of `b_i - a_i`.
        difference_interval: Its bootstrap interval.
        win_rate: Fraction of pairs with `b_i > a_i`; a tie counts as a half.
        win_rate_interval: Its bootstrap interval; if all pairs are wins or all are losses, the exact binomial interval.
    """

    reward: str
    pairs: int
    sampled: str
    unpaired: tuple[int, int]
    mean_a: float
    mean_b: float
    difference: float
    difference_interval: Interval
    win_rate: float
    win_rate_interval: Interval


def compare(
    first: Sequence[ScoredImage], second: Sequence[ScoredImage], resamples: int = 2000, seed: int = 0
) -> list[Comparison]:
    """Compare two folders of images, paired by file name (if need be without suffix) and prompt, or else by prompt.

    Images of the same prompt are not independent, so the bootstrap samples prompts with all of their pairs. If there
    are fewer than 10 prompts, it samples pairs; the intervals then hold for these prompts only.

    Args:
        first: Images of the first folder, such as those of the base model.
        second: Images of the second folder.
        resamples: Bootstrap samples, at least 100.
        seed: Seed of the bootstrap.

    Returns:
        One comparison for each reward.

    Raises:
        ConfigurationError: There are no pairs.
    """
    pairs = pair_images(first, second)
    units, sampled = resampled_units(pairs)
    found = []
    for name in [name for name in first[0].scores if name in second[0].scores]:
        a, b = (np.array([pair[side].scores[name] for pair in pairs], dtype=np.float64) for side in (0, 1))
        wins = (b > a) + 0.5 * (b == a)
        of_difference, of_wins = bootstrap_intervals([b - a, wins], units, resamples, seed)
        found.append(
            Comparison(
                reward=name,
                pairs=len(pairs),
                sampled=sampled,
                unpaired=(len(first) - len(pairs), len(second) - len(pairs)),
                mean_a=float(a.mean()),
                mean_b=float(b.mean()),
                difference=float((b - a).mean()),
                difference_interval=of_difference,
                win_rate=float(wins.mean()),
                win_rate_interval=win_rate_interval(wins, units, of_wins),
            )
        )
    return found


def report(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """Write comparisons as a Markdown table."""
    head = comparisons[0]
    without = " and ".join(
        f"{count} of {name}" for count, name in zip(head.unpaired, (first, second), strict=True) if count
    )
    lines = [
        f"# {second} against {first}",
        "",
        f"{head.pairs} pairs of images; intervals are of 95 % confidence, by bootstrap over the {head.sampled}."
        + (f" Images without a counterpart, not compared: {without}." if without else ""),
        "",
        f"| reward | mean of {first} | mean of {second} | difference | interval | win rate | interval |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for c in comparisons:
        low, high = c.difference_interval
        least, most = c.win_rate_interval
        lines.append(
            f"| {c.reward} | {c.mean_a:.4g} | {c.mean_b:.4g} | {c.difference:+.4g} | {low:+.4g} to {high:+.4g} | "
            f"{c.win_rate:.1%} | {least:.1%} to {most:.1%} |"
        )
    return "\n".join(lines) + "\n"


def contact_sheet(
    folder: str | Path, rows: Sequence[ScoredImage], reward: str, most: int = 64, side: int = 128, per_row: int = 8
) -> Image.Image:
    """Return a sheet of images sorted by one score, best first, with the score under each image.

    Args:
        folder: Folder of the images.
        rows: Scored images; if there are more than `most`, the best `most / 2` and the worst `most / 2` are shown.
        reward: Name of the score to sort by.
        most: Number of images on the sheet.
        side: Longest side of an image, in pixels; smaller images are enlarged by an integer factor.
        per_row: Images in a row.
    """
    ordered = sorted(rows, key=lambda row: row.scores[reward], reverse=True)
    if len(ordered) > most:
        ordered = ordered[: most - most // 2] + ordered[len(ordered) - most // 2 :]
    columns, height = min(per_row, len(ordered)), side + 18
    sheet = Image.new("RGB", (columns * (side + 4), -(-len(ordered) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(ordered):
        left, top = index % columns * (side + 4), index // columns * height
        sheet.paste(_thumbnail(Path(folder) / row.file, side), (left, top))
        pen.text((left + 2, top + side + 2), f"{row.scores[reward]:.4g}", fill="black")
    return sheet


def _thumbnail(path: Path, side: int) -> Image.Image:
    image = read_image(path)
    factor = side // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    return image
