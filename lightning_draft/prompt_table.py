"""A sequence of prompts that stores metadata by column, so that a million rows need little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from lightning_draft.prompt import Columns, Prompt

_NONE = -1
_MOST_SHARED = 1000


class PromptTable(Sequence[str]):
    """Prompts as plain strings, and their metadata by column.

    An element with metadata is created on access. Rows with the same column names are stored in one block of columns;
    if a column has few different values, equal strings are stored once.

    Args:
        texts: The prompts so far.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = list(texts)
        self._blocks: list[tuple[tuple[str, ...], tuple[Any, ...]]] = []
        self._block_numbers: dict[tuple[str, ...], int] = {}
        self._block_of = array("i", [_NONE]) * len(self.texts)
        self._place_of = array("i", [0]) * len(self.texts)
        self._shared: dict[tuple[tuple[str, ...], str], dict[str, str]] = {}

    @classmethod
    def from_columns(
        cls, texts: Iterable[str], names: tuple[str, ...], columns: Sequence[Sequence[Any]]
    ) -> "PromptTable":
        """Return prompts with metadata from complete columns.

        Args:
            texts: The prompts.
            names: Names of the columns.
            columns: One sequence for each name, with a value for each prompt.
        """
        table = cls(texts)
        if not names:
            return table
        table._blocks = [(names, tuple(columns))]
        table._block_of = array("i", [0]) * len(table)
        table._place_of = array("i", range(len(table)))
        return table

    def append(self, text: str) -> None:
        """Add a prompt without metadata, or a `Prompt` with its own."""
        self.texts.append(text)
        self._block_of.append(_NONE)
        self._place_of.append(0)

    def append_rows(self, texts: Sequence[str], names: tuple[str, ...], columns: Sequence[Sequence[Any]]) -> None:
        """Add prompts with metadata.

        Args:
            texts: The prompts.
            names: Names of the columns.
            columns: One sequence for each name, with a value for each prompt.
        """
        if names not in self._block_numbers:
            self._block_numbers[names] = len(self._blocks)
            self._blocks.append((names, tuple([] for _ in names)))
        number = self._block_numbers[names]
        stored = self._blocks[number][1]
        first = len(stored[0]) if stored else 0
        self.texts += texts
        self._block_of.extend([number] * len(texts))
        self._place_of.extend(range(first, first + len(texts)))
        for name, column, values in zip(names, stored, columns, strict=True):
            column.extend(_share(values, self._shared.setdefault((names, name), {})))

    def select(self, rows: Sequence[int]) -> "PromptTable":
        """Return the prompts of some rows in the given order; the columns are shared."""
        part = PromptTable()
        part._blocks = self._blocks
        part.texts = [self.texts[row] for row in rows]
        part._block_of = array("i", [self._block_of[row] for row in rows])
        part._place_of = array("i", [self._place_of[row] for row in rows])
        return part

    def without_blanks(self) -> "PromptTable":
        """Return the prompts that contain more than white space."""
        rows = [row for row, text in enumerate(self.texts) if text and not text.isspace()]
        return self if len(rows) == len(self) else self.select(rows)

    @property
    def has_columns(self) -> bool:
        """Whether rows with metadata were added."""
        return bool(self._blocks)

    @property
    def column_groups(self) -> list[tuple[str, ...]]:
        """Names of the columns of each group of rows that have the same ones."""
        return [names for names, _ in self._blocks]

    @property
    def column_names(self) -> set[str]:
        """Names of the columns of all rows."""
        return {name for names, _ in self._blocks for name in names}

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptTable": ...

    def __getitem__(self, index: int | slice) -> "str | PromptTable":
        """Return one prompt, a `Prompt` if it has metadata, or a slice of the table."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        block, text = self._block_of[index], self.texts[index]
        if block == _NONE:
            return text
        names, columns = self._blocks[block]
        place = self._place_of[index]
        return Prompt(text, Columns(names, tuple(column[place] for column in columns)))

    def __iter__(self) -> Iterator[str]:
        """Yield the prompts."""
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Compare the texts with those of a list, tuple or table."""
        if isinstance(other, PromptTable):
            return self.texts == other.texts
        return self.texts == list(other) if isinstance(other, (list, tuple)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _share(values: Sequence[Any], known: dict[str, str]) -> Sequence[Any]:
    """Replace strings by equal stored strings, for at most a thousand different strings."""
    if len(known) > _MOST_SHARED or type(values[0]) is not str:
        return values
    return [known.setdefault(value, value) if type(value) is str else value for value in values]
