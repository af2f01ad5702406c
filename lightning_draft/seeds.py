"""Seeds: their range, and seeds derived from several numbers."""

from typing import Any

from lightning_draft.errors import ConfigurationError

_END = 2**63


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return `seed` if it is an integer in `0..2^63 - 1`.

    Raises:
        ConfigurationError: It is not an integer in this range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _END:
        raise ConfigurationError(f"{name}={seed!r} must be an integer between 0 and 2^63 - 1; write for example 0")
    return seed


def derive_seed(*numbers: int) -> int:
    """Return a seed in `[0, 2^63)` derived from several numbers by a linear congruential recurrence.

    Neighboring inputs (ranks, batches, samples) lead to unrelated random streams.

    Args:
        numbers: For example the run's seed, the batch number and the rank.
    """
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) % _END
    return seed
