"""Restore null in options of the command line, which jsonargparse converts to the text "None" in nested options."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from jsonargparse import Namespace


def restore_nulls(config: Any, args: Sequence[str]) -> None:
    """Set options to `None` whose value on the command line is `null`, such as `--model.model.text.cache null`.

    Args:
        config: The parsed options, which are changed.
        args: The arguments of the command line.
    """
    for name, value in _given(args):
        if "null" in value:
            *owners, last = name.removeprefix("--").split(".")
            _restore(_owner(config, owners), last)


def _given(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name, value if equals else following


def _owner(config: Any, names: Sequence[str]) -> Any:
    """Return the part of the configuration that has an option; names of options omit `init_args`."""
    for name in names:
        if not _is_part(config):
            return None
        config = config[name] if name in config else _arguments(config).get(name)
    return _arguments(config) if _is_part(config) else None


def _arguments(part: Any) -> Any:
    return part["init_args"] if _is_part(part.get("init_args")) else part


def _restore(part: Any, name: str) -> None:
    value: Any = None if part is None else part.get(name)
    if value == "None":
        part[name] = None
    elif _is_part(value):
        for key in list(value.keys()):
            _restore(value, key)


def _is_part(value: Any) -> bool:
    return isinstance(value, (Namespace, MutableMapping))
