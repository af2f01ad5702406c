"""Faults in the text of a config whose place the parser does not report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_draft.errors import ConfigurationError


def check_names(path: str) -> None:
    """Check that no key of a config is empty, and that no name of a class begins or ends with a space.

    Args:
        path: The config; nothing is checked if it cannot be read.

    Raises:
        ConfigurationError: There is such a name; the message has its line.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    for key, value in _entries(root):
        line = f"{path}, line {key.start_mark.line + 1}"
        name = value.value if isinstance(value, yaml.ScalarNode) else ""
        if isinstance(key, yaml.ScalarNode) and not key.value.strip():
            raise ConfigurationError(
                f"{line}: the key {key.value!r} is empty; write the name of an option or remove it"
            )
        if key.value == "class_path" and name != name.strip():
            raise ConfigurationError(
                f"{line}: class_path={name!r} begins or ends with a space; write class_path: {name.strip()}"
            )


def _entries(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of a node and of the nodes in it."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value
            yield from _entries(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _entries(value)
