"""Prompts from the batches of any data loader."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_draft.arguments import prompt_list
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import Prompt

COLUMN = "prompt"


def to_prompts(batch: Any) -> list[str]:
    """Return the prompts of a batch.

    Args:
        batch: A sequence of strings; a sequence of rows (mappings) with a `prompt` column; or a mapping of columns, as
            created by torch's default collate function. Other columns become the metadata of each `Prompt`.

    Raises:
        ConfigurationError: The batch is none of these.
    """
    if isinstance(batch, Mapping):
        return prompt_list([_row_to_prompt(row) for row in _rows(batch)], "the batch's prompts")
    if isinstance(batch, Sequence) and batch and all(isinstance(row, Mapping) for row in batch):
        return prompt_list([_row_to_prompt(row) for row in batch], "the batch's prompts")
    return prompt_list(batch, "the batch")


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a mapping from column names to sequences or tensors of equal length."""
    prompts = columns.get(COLUMN)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ConfigurationError(
            f"the batch is a mapping with the keys {', '.join(map(repr, columns))}; it needs {COLUMN!r}, a list of "
            "strings"
        )
    uneven = [name for name, values in columns.items() if len(values) != len(prompts)]
    if uneven:
        raise ConfigurationError(
            f"the batch's column {uneven[0]!r} has {len(columns[uneven[0]])} values for {len(prompts)} prompts; give "
            "one value for each prompt"
        )
    return [{name: _plain(values[i]) for name, values in columns.items()} for i in range(len(prompts))]


def _row_to_prompt(row: Mapping[str, Any]) -> Any:
    if COLUMN not in row:
        raise ConfigurationError(
            f"a row of the batch has the columns {', '.join(map(repr, row))}; it needs {COLUMN!r}, the text"
        )
    text = row[COLUMN]
    return Prompt(text, {name: row[name] for name in row if name != COLUMN}) if isinstance(text, str) else text


def _plain(value: Any) -> Any:
    """Return a tensor with one element as a number; torch's default collate function converts numbers to tensors."""
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
