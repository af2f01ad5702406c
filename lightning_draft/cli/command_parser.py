"""The parser of the commands whose help pages are in `pages`."""

import argparse
from typing import Any, NoReturn

from lightning_draft.cli.shipped import nearest
from lightning_draft.errors import ConfigurationError

_UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """A parser without help and abbreviations that raises instead of ending the process.

    Args:
        prog: The command, such as `lightning-draft score`.
        options: Further options of `argparse.ArgumentParser`, from subparsers.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ConfigurationError`, with the most similar option if there is none of a name."""
        unknown = [word.partition("=")[0] for word in message.removeprefix(_UNKNOWN).split() if word.startswith("--")]
        if message.startswith(_UNKNOWN) and unknown:
            similar = nearest(unknown[0].lstrip("-"), (name.lstrip("-") for name in _options(self)))
            message = f"there is no option {unknown[0]}{similar.replace('mean ', 'mean --')}"
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of its subcommands."""
    names = [name for action in parser._actions for name in action.option_strings]
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return names + [name for group in groups for each in group.choices.values() for name in _options(each)]
