"""Read prompts from lists, files, shipped lists and data sets."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import NEGATIVE_COLUMN
from lightning_draft.prompt_files import SUFFIXES, read_file
from lightning_draft.prompt_rows import check_column, to_prompts
from lightning_draft.prompt_table import PromptTable

_ACCEPTED = (
    "give a list of strings, a list of rows with a prompt column, a prompt file, the name of a shipped list, or a data "
    "set of the datasets package"
)


def read_prompts(source: Any, column: str = "prompt", split: str = "train") -> Sequence[str]:
    """Read prompts from a list, a file, a shipped list or a data set.

    Args:
        source: A list or tuple of strings or of rows (dictionaries with the prompt under `column`), a
            `datasets.Dataset`, a pandas `DataFrame`; or, as a string, the path of a file (`.txt`, `.csv`, `.tsv`,
            `.json`, `.jsonl`, `.ndjson`, `.parquet`), the name of a shipped list, or the folder or hub id of a data
            set.
        column: The prompt's column, if there are columns. The other columns become metadata.
        split: Split of a data set that is read by its folder or hub id.

    Returns:
        The prompts that are not blank: plain strings in a list, or a `PromptTable`, whose elements with metadata are
        `Prompt` objects.

    Raises:
        ConfigurationError: The source does not exist or contains no prompts.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        table = _read(source, column, split) if source.strip() else PromptTable()
    else:
        table = _read_object(source, column)
    prompts = table.without_blanks()
    _warn_of_misspelled_columns(prompts)
    if not prompts:
        shown = repr(source) if isinstance(source, str) else f"the {type(source).__name__} that was given"
        raise ConfigurationError(f"there are no prompts in {shown}; {_ACCEPTED}")
    return prompts if prompts.has_columns else prompts.texts


def _warn_of_misspelled_columns(prompts: PromptTable) -> None:
    """Warn of the first column that is almost named like that of negative prompts; rewards may read other columns."""
    for names in prompts.column_groups:
        plain = {str(name).strip().lower().replace(" ", "_"): name for name in names}
        near = difflib.get_close_matches(NEGATIVE_COLUMN, plain, n=1, cutoff=0.8)
        if NEGATIVE_COLUMN not in names and near:
            rank_zero_warn(
                f"the column {plain[near[0]]!r} of the prompts is not read as {NEGATIVE_COLUMN!r}, because its name "
                f"differs; rename it to {NEGATIVE_COLUMN!r} for negative prompts, or ignore this if a reward reads it"
            )
            return


def shipped_lists() -> list[str]:
    """Return the names of the shipped prompt lists."""
    return sorted(_shipped())


def _read_object(source: Any, column: str) -> PromptTable:
    if isinstance(source, PromptTable):
        return source
    if isinstance(source, (list, tuple)):
        return to_prompts(source, column, "the list of prompts", "element")
    names = getattr(source, "column_names", None)
    if isinstance(names, list) and hasattr(source, "select_columns"):
        return _read_rows(source, names, column)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return to_prompts(source.to_dict("records"), column, "the table")
    if isinstance(names, Mapping):
        raise ConfigurationError(
            f"prompts are a DatasetDict with the splits {', '.join(names)}; pass one split, such as "
            f"prompts[{next(iter(names))!r}]"
        )
    raise ConfigurationError(f"prompts are of type {type(source).__name__}; {_ACCEPTED}")


def _read_rows(rows: Iterable[Any], names: list[str], column: str, where: str = "the data set") -> PromptTable:
    """Read a `datasets.Dataset`."""
    check_column(names, column, where)
    return to_prompts(rows, column, where)


def _read(source: str, column: str, split: str) -> PromptTable:
    shipped = _shipped().get(source)
    path = Path(source).expanduser()
    if shipped is not None:
        return read_file(shipped, column)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ConfigurationError(f"there is no file {source!r}; give the path of a prompt file")
        return read_file(path, column)
    if path.is_file():
        raise ConfigurationError(
            f"{source!r} has a suffix that is not supported; give a prompt file that ends in {', '.join(SUFFIXES)}"
        )
    if not path.exists():
        _raise_for_mistakes(source)
    return _read_data_set(str(path) if path.exists() else source, column, split)


def _shipped() -> dict[str, Path]:
    """Return the files of the shipped prompt lists by name."""
    folder = Path(str(files("lightning_draft") / "prompts"))
    return {file.stem: file for file in folder.iterdir() if file.suffix in (".txt", ".csv")}


def _raise_for_mistakes(source: str) -> None:
    """Raise if a source cannot be the name of a data set; the message suggests what was probably meant."""
    near = difflib.get_close_matches(source, shipped_lists(), n=1, cutoff=0.75)
    if near:
        raise ConfigurationError(f"there is no prompt list {source!r}; did you mean {near[0]}")
    if source[:1] in "[{" or source in ("null", "true", "false") or source.replace(".", "", 1).isdigit():
        raise ConfigurationError(
            f"{source!r} is not a list of strings; write each prompt as a string, such as ['a cat', '2 dogs'], or "
            "name a file"
        )
    if any(character.isspace() for character in source):
        raise ConfigurationError(
            f"{source!r} is not the name of a file or data set; write prompts as a list: [{source}]"
        )
    if source.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no file or folder {source!r}; {_ACCEPTED}")


def _read_data_set(source: str, column: str, split: str) -> PromptTable:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ConfigurationError(
            f"{source!r} is neither a prompt file nor a shipped list ({', '.join(shipped_lists())}); to read it as a "
            "data set, run pip install 'lightning-draft[datasets]'"
        ) from error
    try:
        saved = (Path(source) / "state.json").is_file()
        rows = load_from_disk(source) if saved else load_dataset(source, split=split)
    except Exception as error:
        raise ConfigurationError(f"the data set {source!r} (split {split!r}) could not be read: {error}") from error
    return _read_rows(rows, list(rows.column_names), column, source)
