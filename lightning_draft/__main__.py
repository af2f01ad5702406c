"""The command `lightning-draft`; heavy packages are imported only by the commands that need them."""

import os
import sys
from collections.abc import Sequence

from lightning_draft import __version__
from lightning_draft.cli import pages, shipped
from lightning_draft.cli.messages import FAILED, INTERRUPTED, USAGE, as_configuration_error, print_error
from lightning_draft.cli.output import VERBOSE, quiet_output
from lightning_draft.cli.process import check_process_variables, import_from_current_folder
from lightning_draft.errors import ConfigurationError, DivergenceError, RewardServiceError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 for success, 1 for an error in training or of a reward's service, 2 for invalid input, 130 for
    Ctrl-C and 143 for SIGTERM.

    Args:
        args: The arguments after the command's name; by default those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if "--verbose" in arguments:
        arguments.remove("--verbose")
        os.environ[VERBOSE] = "1"
    try:
        with quiet_output():
            return _dispatch(arguments)
    except DivergenceError as error:
        print_error(f"training failed: {error}")
        return FAILED
    except RewardServiceError as error:
        print_error(str(error))
        return FAILED
    except ConfigurationError as error:
        print_error(str(error))
        return USAGE
    except KeyboardInterrupt:
        print_error("stopped by Ctrl-C")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(pages.MAIN)
        return 0
    if command in ("-V", "--version"):
        print(f"lightning-draft {__version__}")
        return 0
    if command == "configs":
        return _configs(rest)
    if command == "completion":
        return _completion(rest)
    if command in pages.COMMANDS:
        with as_configuration_error():
            return _run(command, rest)
    known = [*pages.COMMANDS, "configs", "completion", "--help", "--version"]
    hint = f": {pages.INSTEAD[command]}" if command in pages.INSTEAD else shipped.nearest(command, known)
    raise ConfigurationError(f"there is no command {command!r}{hint}; see lightning-draft --help")


def _run(command: str, rest: list[str]) -> int:
    """Run a command of `pages.COMMANDS`."""
    is_help = [arg in ("-h", "--help") for arg in rest]
    # `fit --config FILE --help` is for the parser of classes, which lists every option.
    if rest and (all(is_help) if command in ("fit", "validate") else any(is_help)):
        print(pages.COMMANDS[command])
        return 0
    check_process_variables()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import_from_current_folder()
    if command == "sample":
        from lightning_draft.cli.sample import main as sample

        return sample(rest)
    if command == "guide":
        from lightning_draft.cli.guide import main as guide

        return guide(rest)
    if command == "score":
        from lightning_draft.cli.score import main as score

        return score(rest)
    if command == "vote":
        from lightning_draft.cli.vote import main as vote

        return vote(rest)
    if command == "lora":
        from lightning_draft.cli.lora import main as lora

        return lora(rest)
    if command == "plan":
        from lightning_draft.cli.plan import main as plan

        return plan(rest)
    rest = shipped.expand(command, rest)
    from lightning_draft.cli.app import run

    return run("fit" if command == "fit" else "validate", rest)


def _configs(rest: list[str]) -> int:
    if rest in ([], ["list"]):
        print(shipped.listing())
    elif rest[:1] == ["show"] and len(rest) == 2:
        print(shipped.locate(rest[1]).read_text(encoding="utf-8"), end="")
    elif rest in (["-h"], ["--help"]):
        print(pages.CONFIGS)
    else:
        raise ConfigurationError(
            f"there is no command `configs {' '.join(rest)}`; write `configs list` or `configs show NAME`"
        )
    return 0


def _completion(rest: list[str]) -> int:
    if len(rest) != 1 or rest[0] in ("-h", "--help"):
        print(pages.COMPLETION)
        return 0 if rest else USAGE
    from lightning_draft.cli.completion import script

    print(script(rest[0]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
