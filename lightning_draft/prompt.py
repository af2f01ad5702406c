"""Prompts with metadata."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

NEGATIVE_COLUMN = "negative_prompt"
"""Name of the column of prompt files with the negative prompt of each prompt."""

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Columns(Mapping[str, Any]):
    """Read-only values by name; rows that have the same names share them to save memory.

    Args:
        names: Names of the columns, the same tuple for all rows.
        values: The row's values in that order.
    """

    __slots__ = ("_names", "_values")

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
        self._names = names
        self._values = values

    def __getitem__(self, name: str) -> Any:
        """Return the value of a column."""
        try:
            return self._values[self._names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._names)

    def __repr__(self) -> str:
        """Show the values as a dictionary does."""
        return repr(dict(self))


class Prompt(str):
    """A prompt: a string that may have metadata for rewards, such as a class, a count or a target.

    Args:
        text (str): The prompt.
        metadata (Mapping | None): Values by name; copied.
    """

    __slots__ = ("metadata",)

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        """Create the string; `str` is immutable, so `__init__` would be too late."""
        prompt = super().__new__(cls, text)
        if metadata and not isinstance(metadata, Columns):
            metadata = dict(metadata)
        prompt.metadata = metadata or _NO_METADATA
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the metadata when pickled or copied."""
        return type(self), (str(self), dict(self.metadata))


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """Return the metadata of a prompt; a plain string has none."""
    return prompt.metadata if isinstance(prompt, Prompt) else _NO_METADATA
