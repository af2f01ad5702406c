"""Read rows of prompts from text, CSV, JSON and Parquet files; errors name the file and the line."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import NEGATIVE_COLUMN
from lightning_draft.prompt_rows import (
    Place,
    RowCollector,
    check_column,
    check_texts,
    checked_negatives,
    numbered_prompts,
    to_prompts,
)
from lightning_draft.prompt_table import PromptTable


def read_file(path: Path, column: str) -> PromptTable:
    """Read the prompts of a file whose suffix is one of `SUFFIXES`, in lower or upper case.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        column: Name of the prompt's column, if the file has columns; the others become metadata.

    Raises:
        ConfigurationError: The file cannot be read or has another content; the message names the line.
    """
    try:
        prompts = _READERS[path.suffix.lower()](path, column)
        _check_encoding(prompts.texts, path)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text in UTF-8 ({error}); save it in UTF-8") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; give a file that can be read") from error
    return prompts


def _check_encoding(texts: Sequence[str], path: Path) -> None:
    """Check that no text has a NUL character, as UTF-16 without a byte order mark has when it is read as UTF-8.

    Raises:
        ConfigurationError: A text has one.
    """
    if any("\0" in text for text in texts):
        raise ConfigurationError(
            f"{path} contains NUL characters, as text in UTF-16 or binary data does; save it in UTF-8"
        )


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline=None)


def _read_text(path: Path, column: str) -> PromptTable:
    with _open(path) as file:
        return PromptTable([line.strip() for line in file])


def _read_json(path: Path, column: str) -> PromptTable:
    with _open(path) as file:
        rows = _parse(file.read(), path)
    if not isinstance(rows, list):
        raise ConfigurationError(f"{path} must contain a list of prompts, or of rows with the column {column!r}")
    return to_prompts(rows, column, path)


def _read_json_lines(path: Path, column: str) -> PromptTable:
    with _open(path) as file:
        return numbered_prompts(_json_rows(file, path), column, path, "line")


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank, in half the time of `json.loads`."""
    scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
    for number, line in enumerate(file, 1):
        if text := line.strip():
            try:
                row, end = scan(text, 0)
            except (StopIteration, ValueError, RecursionError):
                row, end = None, 0
            yield number, row if end == len(text) else _parse(text, Place(path, "line", number))


def _parse(text: str, where: Any) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = "" if isinstance(where, Place) else f"line {error.lineno}, "
        raise ConfigurationError(f"{where} is not JSON: {error.msg} ({place}column {error.colno})") from error
    except RecursionError as error:
        raise ConfigurationError(
            f"{where} is nested too deeply; write a string, or a row with the column 'prompt'"
        ) from error


def _read_csv(path: Path, column: str) -> PromptTable:
    return _read_table(path, column, ",")


def _read_tsv(path: Path, column: str) -> PromptTable:
    return _read_table(path, column, "\t")


def _read_table(path: Path, column: str, delimiter: str) -> PromptTable:
    collector = RowCollector(column, path, "line", strip=True)
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        rows = _rows(file, delimiter, path)
        _, header, _ = next(rows, (1, [], []))
        names = [name.strip() for name in header]
        _check_header(names, column, path, delimiter)
        columns = tuple(names)
        for line, fields, lines in rows:
            if len(fields) != len(names):
                fields = _repair(fields, names, lines, Place(path, "line", line))
            collector.add(line, columns, fields)
    return collector.finish()


def _repair(fields: list[str], names: list[str], lines: list[str], where: Place) -> list[str]:
    """Return the fields of a row, repaired if its only column contains commas or it ends with empty fields.

    Raises:
        ConfigurationError: The row has another number of fields than the header.
    """
    if len(names) == 1 and fields:
        return ["".join(lines).rstrip("\r\n")]
    if len(fields) > len(names) and not any(fields[len(names) :]):
        return fields[: len(names)]
    raise ConfigurationError(
        f"{where} must have {len(names)} fields like the header, not {len(fields)}; put a text that contains the "
        'delimiter between double quotes, such as "a cat, sitting"'
    )


def _rows(file: TextIO, delimiter: str, path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the number of the first line, the fields and the lines of each row that is not empty."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in file:
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a double quote is not closed" if "end of data" in str(error) else str(error)
            raise ConfigurationError(
                f'{path}, line {first}: {reason}; between double quotes write "" for a double quote'
            ) from error
        if "".join(fields).strip():
            yield first, fields, taken


def _check_header(names: list[str], column: str, path: Path, delimiter: str) -> None:
    if column not in names and delimiter == "," and any(column in name.split(";") for name in names):
        raise ConfigurationError(f"{path} separates columns by semicolons; save it with commas, or as .tsv with tabs")
    if column not in names and delimiter == "," and any(column in name.split("\t") for name in names):
        raise ConfigurationError(f"{path} separates columns by tabs; rename it to .tsv")
    check_column(names, column, path)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"{path} has two columns named {twice[0]!r}; rename one of them")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters per field within this context."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, column: str) -> PromptTable:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise ConfigurationError(f"{path}: reading Parquet files needs pyarrow; run pip install pyarrow") from error
    try:
        table = read_table(path)
    except (ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"{path} is not a Parquet file ({reason}); give one, or a .csv file") from error
    check_column(table.column_names, column, path)
    texts = table.column(column).to_pylist()
    check_texts(texts, count(1), column, path, "row")
    others = tuple(name for name in table.column_names if name != column)
    columns: list[Sequence[Any]] = [_ArrowColumn(table.column(name)) for name in others]
    if NEGATIVE_COLUMN in others:
        place = others.index(NEGATIVE_COLUMN)
        columns[place] = checked_negatives(table.column(NEGATIVE_COLUMN).to_pylist(), count(1), path, "row")
    return PromptTable.from_columns(texts, others, columns)


class _ArrowColumn(Sequence[Any]):
    """The values of a column of an Arrow table as Python objects, created on access."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        return self.column[index].as_py()


_READERS: dict[str, Callable[[Path, str], PromptTable]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
