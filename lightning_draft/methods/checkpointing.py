"""The option `checkpointing`: which activations the backward pass recomputes."""

from typing import Literal, get_args

from lightning_draft.arguments import one_of
from lightning_draft.recompute import Recompute

Checkpointing = Literal["auto", "none", "step", "block", "both"]


def check_checkpointing(value: Checkpointing) -> Checkpointing:
    """Return the option.

    Raises:
        ConfigurationError: It is none of the values.
    """
    one_of("checkpointing", value, get_args(Checkpointing))
    return value


def recomputed(value: Checkpointing, automatic: bool, micro_batch_size: int | None = None) -> Recompute:
    """Return the activations that are recomputed.

    Args:
        value: The option.
        automatic: Whether `auto` recomputes steps.
        micro_batch_size: Number of samples for which a graph is built at a time; `None` for all.
    """
    steps = value in ("step", "both") or (value == "auto" and automatic)
    return Recompute(steps, value in ("block", "both"), micro_batch_size)
