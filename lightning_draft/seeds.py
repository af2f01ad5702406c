"""Seeds derived from several numbers."""


def derive_seed(*numbers: int) -> int:
    """Return a seed in `[0, 2^63)` derived from several numbers by a linear congruential recurrence.

    Neighboring inputs (ranks, batches, samples) get unrelated random streams.

    Args:
        numbers: For example the run's seed, the batch number and the rank.
    """
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) % 2**63
    return seed
