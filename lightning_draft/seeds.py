"""Seeds: their range, seeds derived from several numbers, and random states with a seed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lightning_draft.errors import ConfigurationError

_END = 2**63
_SCORING = 0


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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators within this context and restore them afterwards.

    Args:
        seed: The seed.
        device: The device whose generator is seeded and restored, in addition to that of the CPU. For the CPU, GPUs are
            neither initialized nor seeded.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds all GPUs
        else:
            torch.manual_seed(seed)
        yield


def scoring(device: torch.device) -> AbstractContextManager[None]:
    """Return a context for one call of a reward that is not part of training.

    A reward that samples random numbers, such as `Augmented`, uses the same ones at each call, so that scores can be
    compared, do not depend on the batch, and are those of an uninterrupted run after a resume.
    """
    return seeded(_SCORING, device)
