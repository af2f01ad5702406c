"""The arguments and import path of this process."""

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import yaml

from lightning_draft.errors import ConfigurationError

_NUMBERS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK"),
)


def import_from_current_folder() -> None:
    """Allow imports of the user's classes from the current folder, which is searched after installed packages."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here):  # put there by `python -m`
        sys.path.pop(0)
    if here not in sys.path:
        sys.path.append(here)


def is_first_process() -> bool:
    """Return whether this is process 0, from the variables of torchrun, Lightning's launcher and SLURM."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def check_process_variables() -> None:
    """Check the variables of launchers that Lightning reads when it is imported.

    Raises:
        ConfigurationError: One of them is not a number.
    """
    for name in _NUMBERS:
        value = os.environ.get(name, "0")
        if not value.strip().isdecimal():
            raise ConfigurationError(
                f"the environment variable {name}={value!r} must be a number of at least 0, as torchrun and SLURM set "
                f"it; write `unset {name}` for a run of one process"
            )


def overridden_variables(command: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each environment variable of an option whose value is that of a config or an argument.

    Args:
        command: The command, such as `fit`.
        options: Values by dotted name.
    """
    prefix = f"PL_{command.upper()}__"
    for variable, text in os.environ.items():
        name = variable.removeprefix(prefix).replace("__", ".").lower()
        if not variable.startswith(prefix) or name not in options:
            continue
        value = options[name]
        if str(value) != text and value != _parsed(text):
            yield (
                f"{variable}={text} has no effect, because a config or an argument sets {name} to {value}; write "
                f"--{name} {text}"
            )


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def option_values(args: Sequence[str], option: str) -> list[str]:
    """Return the values that an option has among arguments, as `--name value` or `--name=value`."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [arg.partition("=")[2] or after for arg, after in pairs if arg.partition("=")[0] == option]


@contextmanager
def process_arguments(args: list[str]) -> Iterator[None]:
    """Within this context, `sys.argv` contains `args`, with which Lightning starts further processes."""
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def full_option_names(args: Sequence[str]) -> Iterator[None]:
    """Within this context, the help of a nested class, such as `--model.model.help`, shows full option names.

    The parser prints options of the class that contains them: `--model.pretrained` for `--model.model.pretrained`.
    """
    nested = next((arg.partition("=")[0] for arg in args if re.match(r"--\w+(\.\w+)+\.help(=|$)", arg)), None)
    if nested is None:
        yield
        return
    prefix = nested.removesuffix(".help")
    inner = prefix.rpartition(".")[2]
    page = io.StringIO()
    try:
        with redirect_stdout(page):
            yield
    finally:
        print(re.sub(rf"--{inner}\.", f"{prefix}.", page.getvalue()), end="")
