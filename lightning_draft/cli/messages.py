"""What a person can mend is said in one message; what is a bug keeps its traceback."""

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning_draft.errors import ConfigurationError

USAGE = 2
INTERRUPTED = 130


def complain(message: str) -> None:
    """Write one message to the error stream."""
    print(f"lightning-draft: {message}", file=sys.stderr)


@contextmanager
def mendable() -> Iterator[None]:
    """Within this context errors that a person can mend become `ConfigurationError`; others pass unchanged."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigurationError) or not is_mendable(error):
            raise
        raise ConfigurationError(str(error)) from error


@contextmanager
def unwrapped() -> Iterator[None]:
    """Within this context an error of a constructor is raised as it was, not as the parser retells it."""
    try:
        yield
        return
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and _origin(cause).startswith("jsonargparse."):
            cause = cause.__cause__
    raise cause from cause.__cause__  # without what the parser tried and said on the way


def is_mendable(error: BaseException) -> bool:
    """Whether the message alone says what to write instead.

    True for Lightning's `MisconfigurationException`, and for a `ValueError` that a `raise` statement threw on purpose,
    in this package, in Lightning's Trainer or in a constructor.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, (ConfigurationError, MisconfigurationException)):
        return True
    if not isinstance(error, ValueError):
        return False
    place = _place(error)
    if place is None:
        return False
    code = place.tb_frame.f_code
    deliberate = dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
    ours = _origin(error).startswith(("lightning_draft.", "lightning.pytorch.trainer."))
    return deliberate and (ours or code.co_name in ("__init__", "__post_init__"))


def _place(error: BaseException) -> TracebackType | None:
    """Where an error was raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _origin(error: BaseException) -> str:
    """The module in which an error was raised."""
    place = _place(error)
    return "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))
