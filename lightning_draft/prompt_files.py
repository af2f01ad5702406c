"""Read rows of prompts from text, CSV, JSON and Parquet files; errors name the file and the line."""

import csv
import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Columns, Prompt


def read_file(path: Path, column: str) -> list[str]:
    """Read the prompts of a file whose suffix is one of `SUFFIXES`, in lower or upper case.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        column: Name of the prompt's column, where the file has columns; the others become metadata.

    Raises:
        ConfigurationError: It cannot be read or holds something else; the message names the line.
    """
    try:
        with _collector_paused():
            return _READERS[path.suffix.lower()](path, column)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text in UTF-8 ({error}); save it in UTF-8") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; give a file that can be read") from error


class Place(NamedTuple):
    """Where a row stands, for messages; its text is only made for one."""

    source: Any
    kind: str
    number: int

    def __str__(self) -> str:
        """Name the source and the row or line."""
        return f"{self.source}, {self.kind} {self.number}"


def to_prompts(rows: Iterable[Any], column: str, source: Any, kind: str = "row") -> list[str]:
    """Return the prompts of rows: strings, or mappings with the prompt under `column`.

    Raises:
        ConfigurationError: A row has another type, no such column, or a prompt that is not a string.
    """
    names: tuple[str, ...] = ()
    prompts = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            prompts.append(row)
            continue
        where = Place(source, kind, number)
        if not isinstance(row, dict):
            raise ConfigurationError(f"{where} holds {row!r}; a prompt is a string or a row with the column {column!r}")
        if column not in row:
            check_column(list(row), column, where)
        found = tuple(name for name in row if name != column)
        names = names if found == names else found  # one tuple for all rows
        prompts.append(_prompt(row[column], names, tuple(row[name] for name in names), column, where))
    return prompts


def check_column(names: list[Any], column: str, where: Any) -> None:
    """Check that the columns hold the prompt's.

    Raises:
        ConfigurationError: They do not; the message lists them.
    """
    if column in names:
        return
    known = ", ".join(str(name) for name in names[:20]) or "none"
    same = [name for name in names if str(name).strip().lower() == column.lower()]
    example = same[0] if same else names[0] if names else "NAME"
    raise ConfigurationError(
        f"{where} has no column {column!r}; it has {known}: set data.column to the prompt's, such as "
        f"--data.column {example}; a list without columns belongs into a .txt file"
    )


def _prompt(text: Any, names: tuple[str, ...], values: tuple[Any, ...], column: str, where: Any) -> str:
    if not isinstance(text, str):
        raise ConfigurationError(
            f"{where} holds {text!r} ({type(text).__name__}) in the column {column!r}; prompts are strings"
        )
    return Prompt(text, Columns(names, values)) if names else text


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which would visit all earlier rows again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline=None)


def _read_text(path: Path, column: str) -> list[str]:
    with _open(path) as file:
        return [line.strip() for line in file]


def _read_json(path: Path, column: str) -> list[str]:
    with _open(path) as file:
        rows = _parse(file.read(), path)
    if not isinstance(rows, list):
        raise ConfigurationError(f"{path} must hold a list, of prompts or of rows with the column {column!r}")
    return to_prompts(rows, column, path)


def _read_json_lines(path: Path, column: str) -> list[str]:
    with _open(path) as file:
        rows = (
            _parse(line.rstrip(), Place(path, "line", number)) if line.strip() else ""
            for number, line in enumerate(file, 1)
        )
        return to_prompts(rows, column, path, "line")


def _parse(text: str, where: Any) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = "" if isinstance(where, Place) else f"line {error.lineno}, "
        raise ConfigurationError(f"{where} is not JSON: {error.msg} ({place}column {error.colno})") from error
    except RecursionError as error:
        raise ConfigurationError(f"{where} is not a list of prompts: it is nested too deeply") from error


def _read_csv(path: Path, column: str) -> list[str]:
    return _read_table(path, column, ",")


def _read_tsv(path: Path, column: str) -> list[str]:
    return _read_table(path, column, "\t")


def _read_table(path: Path, column: str, delimiter: str) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        rows = _rows(file, delimiter, path)
        _, names, _ = next(rows, (1, [], ""))
        names = [name.strip() for name in names]
        _check_header(names, column, path, delimiter)
        place = names.index(column)
        others = tuple(name for name in names if name != column)
        prompts = []
        for line, fields, raw in rows:
            where = Place(path, "line", line)
            if len(names) == 1 and len(fields) > 1:
                fields = [raw]
            if len(fields) > len(names) and not any(fields[len(names) :]):
                fields = fields[: len(names)]
            if len(fields) != len(names):
                raise ConfigurationError(
                    f"{where} has {len(fields)} fields and the header has {len(names)}; put a text that holds the "
                    'delimiter between double quotes, such as "a cat, sitting"'
                )
            values = tuple(value for index, value in enumerate(fields) if index != place)
            prompts.append(_prompt(fields[place].strip(), others, values, column, where))
        return prompts


def _rows(file: TextIO, delimiter: str, path: Path) -> Iterator[tuple[int, list[str], str]]:
    """Yield the number of the first line, the fields and the text of each row that is not empty."""
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
        if any(field.strip() for field in fields):
            yield first, fields, "".join(taken).rstrip("\r\n")


def _check_header(names: list[str], column: str, path: Path, delimiter: str) -> None:
    if column not in names and delimiter == "," and any(column in name.split(";") for name in names):
        raise ConfigurationError(f"{path} separates columns by semicolons; save it with commas, or as .tsv with tabs")
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


def _read_parquet(path: Path, column: str) -> list[str]:
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
    if table.column_names == [column]:
        texts = table.column(column).to_pylist()
        return [_prompt(text, (), (), column, Place(path, "row", number)) for number, text in enumerate(texts, 1)]
    return to_prompts(table.to_pylist(), column, path)


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
