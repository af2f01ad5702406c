"""Exit statuses, error messages, and which exceptions become one message."""

import errno
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from lightning_draft.errors import ConfigurationError

FAILED = 1
USAGE = 2
INTERRUPTED = 130
TERMINATED = 143

_LIBRARIES = ("lightning_draft.", "lightning.pytorch.", "lightning.fabric.", "torch.optim.")
_CHECKPOINT_READERS = ("lightning.pytorch.trainer.connectors.", "lightning.pytorch.utilities.migration.")
_FILE_SYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
}
_HINTS = {
    errno.ENAMETOOLONG: "write a shorter name",
    errno.ENOENT: "its folder was moved or removed: continue with --ckpt_path last",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
    errno.ELOOP: "the path is a link to itself: choose another place",
}
_OTHER_PLACE = "free the space or choose another folder with --trainer.default_root_dir or --output"


def print_error(message: str) -> None:
    """Write one message to the error stream, with control characters escaped."""
    print(f"lightning-draft: {printable(message)}", file=sys.stderr, flush=True)


def print_warning(message: str) -> None:
    """Write a warning in one line to the error stream, with control characters escaped."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    r"""Return `text` with terminal control characters escaped, such as `\x1b`; line ends and tabs stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp") else _escaped(char)
        for char in text
    )


@contextmanager
def as_root_cause() -> Iterator[None]:
    """Raise the error of a constructor without the parser's exceptions around it."""
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
    else:
        return
    raise cause from cause.__cause__


@contextmanager
def as_configuration_error() -> Iterator[None]:
    """Convert errors of libraries about their options, and file system errors, to `ConfigurationError`.

    These are Lightning's `MisconfigurationException`; a `ValueError` or `ImportError` raised by the Trainer, a callback
    or logger of Lightning, an optimizer or this package; a `TypeError` of those libraries; and a `RuntimeError` of a
    callback or strategy of Lightning, or of its check of callbacks. Other exceptions, such as those of the user's code,
    are not changed and are shown with their traceback.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except _misconfiguration() as error:
        raise ConfigurationError(" ".join(str(error).split())) from error
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        if not f"{_module(error)}.".startswith(_raisers(error)):
            raise
        no_user = "a path begins with ~ and the name of a user without a home folder; write the whole path"
        text = no_user if _module(error) == "pathlib" else " ".join(str(error).split())
        raise ConfigurationError(text) from error
    except KeyError as error:
        if not f"{_module(error)}.".startswith(_CHECKPOINT_READERS):
            raise
        raise ConfigurationError(
            f"the checkpoint lacks a part of the training state ({error.args[0]}); give the last.ckpt of a run"
        ) from error
    except UnpicklingError as error:
        raise ConfigurationError(
            f"the checkpoint contains objects other than tensors and plain values ({str(error).splitlines()[0]}); "
            "--weights_only false loads them, which runs code from the file: use it only for a file that you trust"
        ) from error
    except OSError as error:
        if error.errno not in _FILE_SYSTEM_ERRORS and not _module(error).startswith("tensorboard."):
            raise
        number = error.errno or 0
        place = f" {error.filename}" if error.filename else ""
        raise ConfigurationError(
            f"cannot write or read{place}: {os.strerror(number)}; {_HINTS.get(number, _OTHER_PLACE)}"
        ) from error


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that a constructor raised, without the parser's exceptions around it."""
    while error.__cause__ is not None and _module(error).startswith("jsonargparse."):
        error = error.__cause__
    return error


def with_option_name(message: str, options: Mapping[str, Any]) -> str:
    """Replace the argument's name at the start of a message by the option's full name, if only one option has it.

    Args:
        message: For example `val_size=8 must be ...`, or `SampleLogger: every_n_steps=0 must be ...`.
        options: All options by full name, such as `data.val_size`, with their values.
    """
    match = re.match(r"(?:(\w+): )?([\w.]+)=", message)
    if match is None:
        return message
    kind, name = match.groups()
    found = [key for key in options if f".{key}".endswith(f".{name}")]
    shown = message[match.end() :]
    exact = [key for key in found if re.match(rf"{re.escape(repr(options[key]))}(?!\w)", shown)]
    if kind is not None:
        exact = [key for key in exact if str(options.get(f"{key.rpartition('.')[0]}.class_path", "")).endswith(kind)]
    return f"--{exact[0]}={shown}" if len(exact) == 1 else message


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted option name, that is, without `init_args`."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        leaves |= flatten(value, name)
    return leaves


def _raisers(error: Exception) -> tuple[str, ...]:
    """Return the modules whose exceptions of this type are about options."""
    if isinstance(error, TypeError):
        return _LIBRARIES[1:]
    parts = tuple(f"lightning.pytorch.{part}." for part in ("callbacks", "strategies", "trainer.connectors"))
    parts += ("lightning.fabric.plugins.environments.", "pathlib.")  # a cluster's variables; `~name` without a user
    return parts if isinstance(error, RuntimeError) else _LIBRARIES


def _misconfiguration() -> Any:
    """Return Lightning's exception for options, or no exception if Lightning has not been imported."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if module is None else module.MisconfigurationException


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _module(error: BaseException) -> str:
    """Return the name of the module that raised `error`."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
