"""Rows of prompts: strings, or mappings with the prompt in one column; errors name the row."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import NEGATIVE_COLUMN
from lightning_draft.prompt_table import PromptTable

_ROWS_AT_ONCE = 1024
_EMPTY = ("nan", "<NA>")


class Place(NamedTuple):
    """Position of a row, for messages; the text is created only if it is needed."""

    source: Any
    kind: str
    number: int

    def __str__(self) -> str:
        """Name the source and the row or line."""
        return f"{self.source}, {self.kind} {self.number}"


def to_prompts(rows: Iterable[Any], column: str, source: Any, kind: str = "row") -> PromptTable:
    """Return the prompts of rows: strings, or mappings with the prompt under `column`.

    Raises:
        ConfigurationError: A row has another type, no such column, or a prompt that is not a string.
    """
    return numbered_prompts(enumerate(rows, 1), column, source, kind)


def numbered_prompts(rows: Iterable[tuple[int, Any]], column: str, source: Any, kind: str) -> PromptTable:
    """Return the prompts of numbered rows as `to_prompts` does; messages contain the numbers."""
    collector = RowCollector(column, source, kind)
    for number, row in rows:
        if isinstance(row, dict):
            collector.add(number, tuple(row), row.values())
        elif isinstance(row, str):
            collector.add_text(row)
        else:
            raise ConfigurationError(
                f"{Place(source, kind, number)} is {row!r}; a prompt is a string or a row with the column {column!r}"
            )
    return collector.finish()


class RowCollector:
    """Collect rows into a `PromptTable`, a thousand at a time.

    Args:
        column: The prompt's column.
        source: Name of the source, for messages.
        kind: Name of a row in messages, such as `line`.
        strip: Remove white space around the prompts.
    """

    def __init__(self, column: str, source: Any, kind: str, *, strip: bool = False) -> None:
        self.column, self.source, self.kind, self.strip = column, source, kind, strip
        self._prompts = PromptTable()
        self._names: tuple[Any, ...] | None = None
        self._rows: list[Iterable[Any]] = []
        self._numbers: list[int] = []

    def add_text(self, text: str) -> None:
        """Add a prompt without metadata."""
        self.finish()
        self._prompts.append(text)

    def add(self, number: int, names: tuple[Any, ...], values: Iterable[Any]) -> None:
        """Add a row, with the values of the columns `names`."""
        if names != self._names:
            check_column(list(names), self.column, Place(self.source, self.kind, number))
            self.finish()
            self._names = names
        self._rows.append(values)
        self._numbers.append(number)
        if len(self._rows) == _ROWS_AT_ONCE:
            self.finish()

    def finish(self) -> PromptTable:
        """Return all prompts that were added."""
        if not self._rows:
            return self._prompts
        assert self._names is not None
        columns: list[Sequence[Any]] = [*zip(*self._rows, strict=True)]
        texts = columns.pop(self._names.index(self.column))
        check_texts(texts, self._numbers, self.column, self.source, self.kind)
        others = tuple(name for name in self._names if name != self.column)
        if NEGATIVE_COLUMN in others:
            place = others.index(NEGATIVE_COLUMN)
            columns[place] = checked_negatives(columns[place], self._numbers, self.source, self.kind)
        self._prompts.append_rows([text.strip() for text in texts] if self.strip else texts, others, columns)
        self._rows, self._numbers = [], []
        return self._prompts


def check_texts(texts: Sequence[Any], numbers: Iterable[int], column: str, source: Any, kind: str) -> None:
    """Check that prompts are strings.

    Raises:
        ConfigurationError: A prompt is not a string; the message names its row.
    """
    if set(map(type, texts)) == {str}:
        return
    for number, text in zip(numbers, texts, strict=False):
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{Place(source, kind, number)} has {text!r} ({type(text).__name__}) in the column {column!r}; "
                "prompts are strings"
            )


def checked_negatives(values: Sequence[Any], numbers: Iterable[int], source: Any, kind: str) -> Sequence[str | None]:
    """Return negative prompts, with `None` for the NaN that pandas writes for an empty cell.

    Raises:
        ConfigurationError: A value is neither a string nor empty; the message names its row.
    """
    if set(map(type, values)) <= {str, type(None)}:
        return values
    cells = [None if str(value) in _EMPTY and not isinstance(value, str) else value for value in values]
    for number, value in zip(numbers, cells, strict=False):
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(
                f"{Place(source, kind, number)} has {value!r} ({type(value).__name__}) in the column "
                f"{NEGATIVE_COLUMN!r}; negative prompts are strings, and the cell can be empty"
            )
    return cells


def check_column(names: list[Any], column: str, where: Any) -> None:
    """Check that the prompt's column is among the columns.

    Raises:
        ConfigurationError: It is missing; the message lists the columns.
    """
    if column in names:
        return
    if not names:
        raise ConfigurationError(f"{where} has no columns; write a row with the column {column!r}")
    known = ", ".join(repr(str(name)) for name in names[:20])
    same = [name for name in names if str(name).strip().lower() == column.lower()]
    example = same[0] if same else names[0]
    raise ConfigurationError(
        f"{where} has no column {column!r}, and its columns are {known}; set column to that of the prompts, such as "
        f"column={example!r}, or write prompts without columns to a .txt file"
    )
