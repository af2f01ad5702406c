"""Prompts: where they come from, how they are split, and in which order they are seen."""

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Prompt


class PromptLoader:
    """Endless shuffled prompts in batches, whose order is a function of the seed and the position alone.

    A checkpoint holds the position, so a resumed run sees the prompts that the uninterrupted one would have seen.
    Each process of a distributed run takes its own part of every global batch.

    Args:
        prompts: All of them.
        batch_size: Prompts a process and step.
        shuffle: In a new order each pass, else in the given order.
        seed: Of the order.
        rank: Which process this is.
        world_size: How many processes there are.
        repeats: Yield every batch so many times in a row, as a method needs that trains on it for several steps.
        multiple: Let a pass be a multiple of so many batches: those that the Trainer accumulates gradients over, since
            it ends an optimiser step with every pass.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        multiple: int = 1,
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.multiple = multiple
        self.position = 0

    def __len__(self) -> int:
        """Batches in one pass; a remainder is carried into the next."""
        batches = self.repeats * max(1, len(self.prompts) // (self.batch_size * self.world_size))
        return -(-batches // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Yield one pass of batches, from where the last one ended."""
        for _ in range(len(self) - self.position % len(self)):
            self.position += 1
            yield self.batch(self.position - 1)

    def batch(self, number: int) -> list[Prompt]:
        """The batch that this process sees at `number`."""
        first = (number // self.repeats * self.world_size + self.rank) * self.batch_size
        return [self._prompt(place) for place in range(first, first + self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position."""
        self.position = state["position"]

    def _prompt(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self.prompts))
        return self.prompts[self._order(epoch)[index]]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()


class FixedPrompts:
    """Prompts in their order, once, in batches; each process takes every `world_size`-th.

    Args:
        prompts: All of them.
        batch_size: Prompts a process and batch.
        rank: Which process this is.
        world_size: How many processes there are.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.prompts = prompts[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Yield them."""
        for start in range(0, len(self.prompts), self.batch_size):
            yield list(self.prompts[start : start + self.batch_size])


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and validation.

    Args:
        prompts: A list; or a `.txt` file (one a line), a `.jsonl`, `.json` or `.csv` file; or the name of a shipped
            list (`emoji`, `emoji_names`, `animals`); or a data set folder or hub id that the `datasets` package reads.
            In files with columns, every column but the prompt's becomes metadata that rewards may read.
        val_prompts: Held-out prompts, given likewise; by default `val_size` prompts are held out of `prompts`.
        batch_size: Prompts a process and optimisation step.
        val_batch_size: Prompts a validation batch; by default `batch_size`.
        val_size: How many prompts to hold out, chosen by the seed; used where `val_prompts` is not given.
        column: The prompt's column in files and data sets that have columns.
        split: The split of a data set.
        seed: Of the order and of the choice of held-out prompts.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        val_prompts: list[str] | str | None = None,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        val_size: int = 8,
        column: str = "prompt",
        split: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        for name, size in (("batch_size", self.batch_size), ("val_batch_size", self.val_batch_size)):
            if size < 1:
                raise ConfigurationError(f"{name}={size} must be at least 1")
        self.seed = seed
        everything = read_prompts(prompts, column, split)
        if val_prompts is None:
            self.train_prompts, self.val_prompts = hold_out(everything, val_size, seed)
        else:
            self.train_prompts, self.val_prompts = everything, read_prompts(val_prompts, column, split)

    def train_dataloader(self) -> PromptLoader:
        """Shuffled batches."""
        rank, size = self._process()
        asked = getattr(self.trainer and self.trainer.lightning_module, "steps_per_batch", None)
        return PromptLoader(
            self.train_prompts,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=size,
            repeats=asked(self.batch_size) if callable(asked) else 1,
            multiple=self.trainer.accumulate_grad_batches if self.trainer else 1,
        )

    def val_dataloader(self) -> FixedPrompts:
        """The held-out prompts in their order.

        Raises:
            ConfigurationError: A process would have none, and the others would wait for it.
        """
        rank, size = self._process()
        if 0 < len(self.val_prompts) < size:
            raise ConfigurationError(
                f"{len(self.val_prompts)} held-out prompts do not go round {size} processes; hold out at least {size}"
            )
        return FixedPrompts(self.val_prompts, self.val_batch_size, rank=rank, world_size=size)

    def _process(self) -> tuple[int, int]:
        """Which process this is, of how many."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def hold_out(prompts: list[Prompt], size: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split off `size` prompts chosen by `seed`; both parts keep their order."""
    if size < 0:
        raise ConfigurationError(f"val_size={size} must not be negative; 0 holds nothing out")
    if size >= len(prompts):
        raise ConfigurationError(
            f"val_size={size} of {len(prompts)} in all leaves nothing to train on; lower val_size, or give val_prompts"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(len(prompts), generator=generator)[:size].tolist())
    return (
        [prompt for i, prompt in enumerate(prompts) if i not in chosen],
        [prompt for i, prompt in enumerate(prompts) if i in chosen],
    )


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
