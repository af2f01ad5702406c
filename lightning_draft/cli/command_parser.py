"""The parser of the commands whose help pages are in `pages`."""

import argparse
from typing import Any, NoReturn

from lightning_draft.errors import ConfigurationError


class CommandParser(argparse.ArgumentParser):
    """A parser without help and abbreviations that raises instead of ending the process.

    Args:
        prog: The command, such as `lightning-draft score`.
        options: Further options of `argparse.ArgumentParser`, from subparsers.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ConfigurationError`."""
        raise ConfigurationError(f"{message}; see {self.prog} --help")
