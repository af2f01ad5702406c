"""Contact sheets of scored images, and the comparison of two folders with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lightning_draft.arguments import at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.scoring import ScoredImage

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """The scores of one reward on pairs of images `(a_i, b_i)`; intervals are 95 % confidence intervals.

    Args:
        reward: Name of the reward.
        pairs: Number of pairs.
        mean_a: Mean score of the first folder.
        mean_b: Mean score of the second folder.
        difference: Mean of `b_i - a_i`.
        difference_interval: Its bootstrap interval.
        win_rate: Fraction of pairs with `b_i > a_i`; a tie counts as a half.
        win_rate_interval: Its bootstrap interval.
    """

    reward: str
    pairs: int
    mean_a: float
    mean_b: float
    difference: float
    difference_interval: Interval
    win_rate: float
    win_rate_interval: Interval


def compare(
    first: Sequence[ScoredImage], second: Sequence[ScoredImage], resamples: int = 2000, seed: int = 0
) -> list[Comparison]:
    """Compare two folders of images, paired by file name and prompt, or else by prompt.

    Args:
        first: Images of the first folder, such as those of the base model.
        second: Images of the second folder.
        resamples: Bootstrap samples of the pairs, at least 100.
        seed: Seed of the bootstrap.

    Returns:
        One comparison for each reward.

    Raises:
        ConfigurationError: There are no pairs.
    """
    pairs = pair_images(first, second)
    names = [name for name in first[0].scores if name in second[0].scores]
    found = []
    for name in names:
        a, b = (np.array([pair[side].scores[name] for pair in pairs], dtype=np.float64) for side in (0, 1))
        wins = (b > a) + 0.5 * (b == a)
        intervals = bootstrap_intervals([b - a, wins], resamples, seed)
        found.append(
            Comparison(
                name,
                len(pairs),
                float(a.mean()),
                float(b.mean()),
                float((b - a).mean()),
                intervals[0],
                float(wins.mean()),
                intervals[1],
            )
        )
    return found


def pair_images(first: Sequence[ScoredImage], second: Sequence[ScoredImage]) -> list[tuple[ScoredImage, ScoredImage]]:
    """Pair the images of two folders by file name and prompt, or else by prompt.

    Raises:
        ConfigurationError: There are no pairs.
    """
    by_file = {(row.file, row.prompt): row for row in second}
    pairs = [(row, by_file[row.file, row.prompt]) for row in first if (row.file, row.prompt) in by_file]
    if pairs:
        return pairs
    by_prompt: dict[str, list[ScoredImage]] = {}
    for row in second:
        by_prompt.setdefault(row.prompt, []).append(row)
    pairs = [(row, by_prompt[row.prompt].pop(0)) for row in first if by_prompt.get(row.prompt)]
    if not pairs:
        raise ConfigurationError(
            "the two folders have no images in common, neither by file name and prompt nor by prompt; give the files "
            "of both folders the same names, or give the prompts"
        )
    return pairs


def bootstrap_intervals(samples: Sequence[np.ndarray], resamples: int = 2000, seed: int = 0) -> list[Interval]:
    """Return the 95 % bootstrap intervals of the means of paired samples, all from the same resampled indices.

    Args:
        samples: Arrays of the same length.
        resamples: Number of resamples, at least 100.
        seed: Seed of the indices.
    """
    at_least("resamples", resamples, 100)
    indices = np.random.default_rng(seed).integers(0, len(samples[0]), (resamples, len(samples[0])))
    quantiles = (np.quantile(values[indices].mean(1), [0.025, 0.975]) for values in samples)
    return [(float(low), float(high)) for low, high in quantiles]


def report(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """Write comparisons as a Markdown table."""
    lines = [
        f"# {second} against {first}",
        "",
        f"{comparisons[0].pairs} pairs of images; intervals are of 95 % confidence, by bootstrap over the pairs.",
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
        side: Longest side of an image, in pixels.
        per_row: Images in a row.
    """
    ordered = sorted(rows, key=lambda row: row.scores[reward], reverse=True)
    if len(ordered) > most:
        ordered = ordered[: most - most // 2] + ordered[len(ordered) - most // 2 :]
    height = side + 16
    sheet = Image.new("RGB", (per_row * side, -(-len(ordered) // per_row) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(ordered):
        left, top = index % per_row * side, index // per_row * height
        with Image.open(Path(folder) / row.file) as image:
            thumbnail_image = image.convert("RGB")
        thumbnail_image.thumbnail((side, side))
        sheet.paste(thumbnail_image, (left, top))
        pen.text((left + 2, top + side + 2), f"{row.scores[reward]:.4g}", fill="black")
    return sheet
