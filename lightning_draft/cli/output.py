"""Filter the output of Lightning, torch and Python: fewer notices, one line per warning, no terminal codes."""

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_draft.cli.messages import print_warning, printable

VERBOSE = "LIGHTNING_DRAFT_VERBOSE"
_NOTICES = (
    "\N{ELECTRIC LIGHT BULB}",
    "TPU available",
    "Seed set",
    "`weights_only` was not set",
    "Detected KeyboardInterrupt",
    "Restoring states from",
    "Restored all states from",
)
_EMPTY = "should be kept in float32: []"
"""In a notice of diffusers about no module."""
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "diffusers.models.modeling_utils",
)
_WARNINGS = (
    ".*treespec.*",
    ".*does not have many workers.*",
    ".*in eval mode at the start.*",
    ".*add the following callbacks: \\['RunRecord'\\].*",  # `validate` needs no record
)


@contextmanager
def quiet_output() -> Iterator[None]:
    """Within this context, omit notices that need no action, and print warnings in one line each.

    The environment variable `LIGHTNING_DRAFT_VERBOSE=1`, or `--verbose`, turns this off. Everything is restored at the
    end.
    """
    if os.environ.get(VERBOSE, "0") not in ("", "0"):
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_useful)
    factory, thread_hook = logging.getLogRecordFactory(), threading.excepthook
    logging.setLogRecordFactory(lambda *args, **kwargs: _escape(factory(*args, **kwargs)))
    try:
        with warnings.catch_warnings():
            for text in _WARNINGS:
                warnings.filterwarnings("ignore", text)
            warnings.showwarning = _show_warning
            threading.excepthook = _show_thread_error
            yield
    finally:
        threading.excepthook = thread_hook
        logging.setLogRecordFactory(factory)
        for logger in loggers:
            logger.removeFilter(_is_useful)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print_warning(" ".join(str(message).split()))


def _show_thread_error(error: threading.ExceptHookArgs) -> None:
    """Print the traceback, except of TensorBoard's writer, whose error is raised again by the next value."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(error)


def _escape(record: logging.LogRecord) -> logging.LogRecord:
    if isinstance(record.msg, str):
        record.msg = printable(record.msg)
    return record


def _is_useful(record: logging.LogRecord) -> bool:
    message = re.sub(r"^\s*(\[rank: \d+\] )?", "", record.getMessage())
    return not message.startswith(_NOTICES) and _EMPTY not in message
