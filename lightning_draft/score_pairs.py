"""Pairs of images from two folders, and bootstrap intervals of means over them."""

from collections.abc import Sequence

import numpy as np

from lightning_draft.arguments import integer_at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.score_table import ScoredImage

Interval = tuple[float, float]
Pair = tuple[ScoredImage, ScoredImage]
_LEAST_PROMPTS = 10
"""With fewer prompts, the bootstrap samples pairs instead of prompts."""


def pair_images(first: Sequence[ScoredImage], second: Sequence[ScoredImage]) -> list[Pair]:
    """Pair images by file name and prompt, else by file name without suffix and prompt, else by prompt.

    Raises:
        ConfigurationError: There are no pairs.
    """
    for key in (_by_file, _by_stem):
        others = {key(row): row for row in second}
        pairs = [(row, others[key(row)]) for row in first if key(row) in others]
        if pairs:
            return pairs
    by_prompt: dict[str, list[ScoredImage]] = {}
    for row in second:
        by_prompt.setdefault(row.prompt, []).append(row)
    pairs = [(row, by_prompt[row.prompt].pop(0)) for row in first if by_prompt.get(row.prompt)]
    if not pairs:
        raise ConfigurationError(_no_pairs(first, second))
    return pairs


def _no_pairs(first: Sequence[ScoredImage], second: Sequence[ScoredImage]) -> str:
    prompts = {row.file: row.prompt for row in second}
    same_name = next((row for row in first if row.file in prompts), None)
    if same_name is None:
        return (
            "the two folders have no images in common, neither by file name and prompt nor by prompt; give the files "
            "of both folders the same names, or give the prompts"
        )
    return (
        f"the two folders have no images in common: {same_name.file} has the prompt {same_name.prompt!r} in the first "
        f"and {prompts[same_name.file]!r} in the second; give both the same prompts, for example by --prompts and a "
        "table with the columns file and prompt"
    )


def resampled_units(pairs: Sequence[Pair]) -> tuple[np.ndarray, str]:
    """Return the unit that each pair belongs to, `(N,)` in `0..U - 1`, and what the units are, such as `40 prompts`.

    Images of the same prompt are not independent, so the units are the prompts; if there are fewer than 10 prompts,
    they are the pairs.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair[0].prompt for pair in pairs))}
    if len(prompts) < _LEAST_PROMPTS:
        return np.arange(len(pairs)), f"{len(pairs)} pairs"
    return np.array([prompts[pair[0].prompt] for pair in pairs]), f"{len(prompts)} prompts"


def bootstrap_intervals(
    samples: Sequence[np.ndarray], units: np.ndarray, resamples: int = 2000, seed: int = 0
) -> list[Interval]:
    """Return the 95 % bootstrap percentile intervals of means over pairs, all from the same resampled units.

    Args:
        samples: Arrays `(N,)`, one value per pair.
        units: The unit that each pair belongs to, `(N,)` in `0..U - 1`; whole units are sampled with replacement.
        resamples: Number of samples of `U` units, at least 100.
        seed: Seed of the samples.
    """
    integer_at_least("resamples", resamples, 100)
    count = int(units.max()) + 1
    sums = np.stack([np.bincount(units, values, count) for values in (*samples, np.ones(len(units)))])
    generator = np.random.default_rng(seed)
    means = np.empty((len(samples), resamples))
    for number in range(resamples):
        *totals, pairs = sums[:, generator.integers(0, count, count)].sum(1)
        means[:, number] = np.array(totals) / pairs
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def win_rate_interval(wins: np.ndarray, units: np.ndarray, bootstrap: Interval) -> Interval:
    """Return the bootstrap interval, or, for a rate of 0 or 1, where that has no width, Clopper and Pearson's."""
    bound = 0.025 ** (1 / (int(units.max()) + 1))
    return {0.0: (0.0, 1 - bound), 1.0: (bound, 1.0)}.get(float(wins.mean()), bootstrap)


def _by_file(row: ScoredImage) -> tuple[str, str]:
    return row.file, row.prompt


def _by_stem(row: ScoredImage) -> tuple[str, str]:
    return row.file.rpartition(".")[0], row.prompt
