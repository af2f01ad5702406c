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


def is_mendable(error: BaseException) -> bool:
    """Whether the message alone says what to write instead.

    True for Lightning's `MisconfigurationException`, and for a `ValueError` that a `raise` statement threw on purpose,
    in this package or in a constructor.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, (ConfigurationError, MisconfigurationException)):
        return True
    return isinstance(error, ValueError) and error.__traceback__ is not None and _deliberate(error.__traceback__)


def _deliberate(traceback: TracebackType) -> bool:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    raised = dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
    ours = frame.f_globals.get("__name__", "").startswith("lightning_draft.")
    return raised and (ours or frame.f_code.co_name in ("__init__", "__post_init__"))
