"""Read prompts from lists, files, shipped lists and data sets."""

import csv
import difflib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Prompt


def read_prompts(source: list[str] | str, column: str = "prompt", split: str = "train") -> list[Prompt]:
    """Read prompts from a list, a file, a shipped list or a data set.

    Raises:
        ConfigurationError: Nothing is found there, or what is there holds no prompts.
    """
    if not isinstance(source, str):
        prompts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in source]
    else:
        prompts = _read(source, column, split) if source.strip() else []
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ConfigurationError(f"no prompts in {source!r}; write one a line, or list them")
    return prompts


def _read(source: str, column: str, split: str) -> list[Prompt]:
    shipped = _shipped().get(source)
    path = Path(source)
    if shipped is not None:
        return _READERS[shipped.suffix](shipped, column)
    if path.suffix in _READERS:
        if not path.is_file():
            raise ConfigurationError(f"there is no file {source!r}; give the path of a prompt file")
        try:
            return _READERS[path.suffix](path, column)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{source} is not JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{source} is not text in UTF-8: {error}") from error
    if not path.exists():
        _refuse_slips(source)
    return _read_data_set(source, column, split)


def shipped_lists() -> list[str]:
    """Names of the shipped prompt lists."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    """Files of the shipped prompt lists by name."""
    folder = Path(str(files("lightning_draft") / "prompts"))
    return {file.stem: file for file in folder.iterdir() if file.suffix in (".txt", ".csv")}


def _refuse_slips(source: str) -> None:
    """Name what was meant by a source that is surely not a data set's name."""
    near = difflib.get_close_matches(source, shipped_lists(), n=1, cutoff=0.75)
    if near:
        raise ConfigurationError(f"there is no prompt list {source!r}; did you mean {near[0]}")
    if " " in source:
        raise ConfigurationError(
            f"{source!r} is not the name of a file or data set; write prompts as a list: [{source}]"
        )
    if source.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no file or folder {source!r}")


def _read_text(path: Path, column: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_json(path: Path, column: str) -> list[Prompt]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ConfigurationError(f"{path} must hold a list, of prompts or of rows with the column {column!r}")
    return [Prompt(row) if isinstance(row, str) else _from_row(row, column, str(path)) for row in rows]


def _read_json_lines(path: Path, column: str) -> list[Prompt]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_from_row(json.loads(line), column, str(path)) for line in lines if line.strip()]


def _read_csv(path: Path, column: str) -> list[Prompt]:
    with path.open(newline="", encoding="utf-8") as file:
        return [_from_row(row, column, str(path)) for row in csv.DictReader(file)]


_READERS = {".txt": _read_text, ".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv}


def _read_data_set(source: str, column: str, split: str) -> list[Prompt]:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ConfigurationError(
            f"{source!r} is neither a prompt file nor a shipped list ({', '.join(shipped_lists())}); to read it as a "
            "data set, install the datasets package"
        ) from error
    try:
        saved = (Path(source) / "state.json").is_file()
        rows = load_from_disk(source) if saved else load_dataset(source, split=split)
    except Exception as error:
        raise ConfigurationError(f"the data set {source!r} (split {split!r}) could not be read: {error}") from error
    return [_from_row(row, column, source) for row in rows]


def _from_row(row: Any, column: str, source: str) -> Prompt:
    if not isinstance(row, dict):
        raise ConfigurationError(f"{source} holds {row!r} where a row with the column {column!r} is expected")
    if column not in row:
        raise ConfigurationError(f"{source} has no column {column!r}; it has {', '.join(row)}: set data.column")
    if not isinstance(row[column], str):
        raise ConfigurationError(f"{source} holds {row[column]!r} in the column {column!r}; prompts are text")
    return Prompt(row[column], {name: value for name, value in row.items() if name != column})
