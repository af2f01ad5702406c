"""The arguments and import path of this process."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def import_from_current_folder() -> None:
    """Let classes of the user's be imported from the current folder, after installed packages."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here):  # as `python -m` puts it: a file there would replace a package
        sys.path.pop(0)
    if here not in sys.path:
        sys.path.append(here)


def option_values(args: Sequence[str], option: str) -> list[str]:
    """Return the values that an option has among arguments, as `--name value` or `--name=value`."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [arg.partition("=")[2] or after for arg, after in pairs if arg.partition("=")[0] == option]


@contextmanager
def process_arguments(args: list[str]) -> Iterator[None]:
    """Within this context the process's arguments are `args`, with which Lightning starts further processes."""
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before
