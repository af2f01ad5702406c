"""The command `lightning-draft`; nothing heavy is imported until a verb needs it."""

import os
import sys
from collections.abc import Sequence

from lightning_draft import __version__
from lightning_draft.cli import pages, shipped
from lightning_draft.cli.failures import INTERRUPTED, USAGE, complain
from lightning_draft.errors import ConfigurationError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a person's mistake, 130 for Ctrl-C.

    Args:
        args: What follows the command's name; by default the process's own arguments.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return _dispatch(arguments)
    except ConfigurationError as error:
        complain(str(error))
        return USAGE
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C")
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(pages.MAIN)
    elif verb in ("-V", "--version"):
        print(f"lightning-draft {__version__}")
    elif verb == "configs":
        return _configs(rest)
    elif verb in pages.VERBS:
        if rest in (["-h"], ["--help"]):
            print(pages.VERBS[verb])
            return 0
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if verb == "sample":
            from lightning_draft.cli.sample import main as sample

            return sample(rest)
        rest = shipped.expand(rest)
        from lightning_draft.cli.app import run

        return run(verb, rest)
    else:
        known = ["fit", "validate", "sample", "configs", "--help", "--version"]
        raise ConfigurationError(f"{verb!r} is not a command{shipped.nearest(verb, known)}; see lightning-draft --help")
    return 0


def _configs(rest: list[str]) -> int:
    if rest in ([], ["list"]):
        print(shipped.listing())
    elif rest[:1] == ["show"] and len(rest) == 2:
        print(shipped.locate(rest[1]).read_text(encoding="utf-8"), end="")
    elif rest in (["-h"], ["--help"]):
        print(pages.CONFIGS)
    else:
        raise ConfigurationError(f"configs {' '.join(rest)}: write `configs list` or `configs show NAME`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
