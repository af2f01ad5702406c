"""Prompt data module and loaders: batches, order, and the split into training and validation prompts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_draft.arguments import integer_at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import Prompt
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.prompt_table import PromptTable
from lightning_draft.seeds import check_seed

DEFAULT_VAL_SIZE = 8
_HELD_OUT = 0  # does not depend on the run's seed, so that runs with different seeds can be compared


class PromptLoader:
    """Endless batches of shuffled prompts, in an order that depends only on the seed and the position.

    The position is saved in checkpoints, so that a resumed run uses the same prompts as an uninterrupted one. Each
    process of a distributed run uses its slice of every global batch. The cost of a batch does not depend on the
    number of prompts, because the permutation of an epoch is computed once.

    Args:
        prompts: All training prompts.
        batch_size: Prompts per process and step.
        shuffle: Use a new random order in each epoch; else the given order.
        seed: Seed of the order; epoch `e` uses `seed + e`.
        rank: Number of this process.
        world_size: Number of processes.
        repeats: Yield every batch this many times in a row, for methods that train on a batch for several steps.
        multiple: Round the length of an epoch up to a multiple of this number of batches. Use the number of batches
            over which the Trainer accumulates gradients, because it ends an optimizer step at the end of an epoch.
        distinct: Use only this many batches, from the start (`Trainer(overfit_batches=...)`); None for all.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        multiple: int = 1,
        distinct: int | None = None,
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.multiple = multiple
        self.distinct = distinct
        self.position = 0
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of batches in one epoch; remaining prompts are used in the next epoch."""
        batches = self.repeats * max(1, len(self.prompts) // (self.batch_size * self.world_size))
        return -(-batches // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Yield the batches of one epoch, starting where the previous one ended."""
        for _ in range(len(self) - self.position % len(self)):
            self.position += 1
            yield self.batch(self.position - 1)

    def batch(self, number: int) -> list[Prompt]:
        """Return the batch of this process at position `number`."""
        if self.distinct is not None:
            number %= self.distinct
        first = (number // self.repeats * self.world_size + self.rank) * self.batch_size
        return [self._prompt(place) for place in range(first, first + self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a saved position."""
        self.position = state["position"]

    def _prompt(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self.prompts))
        prompt = self.prompts[int(self._order(epoch)[index]) if self.shuffle else index]
        return prompt if isinstance(prompt, Prompt) else Prompt(prompt)

    def _order(self, epoch: int) -> Tensor:
        """Return the permutation of an epoch; the last two are cached, because a batch may contain prompts of both."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._orders = dict([*self._orders.items()][-1:])
            self._orders[epoch] = torch.randperm(len(self.prompts), generator=generator)
        return self._orders[epoch]


class FixedPrompts:
    """Each prompt once, in order, in batches; each process uses every `world_size`-th prompt.

    Args:
        prompts: All prompts.
        batch_size: Prompts per process and batch.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, prompts: Sequence[str], batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.prompts = prompts[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Yield the batches."""
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            yield [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in batch]


@runtime_checkable
class RepeatsBatches(Protocol):
    """A module that trains on each batch for several consecutive training steps."""

    def training_steps_per_batch(self, batch_size: int) -> int:
        """Return the number of training steps per batch."""


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and validation.

    Args:
        prompts: A list of prompts; a file (`.txt` with one prompt per line, `.csv`, `.tsv`, `.json`, `.jsonl`,
            `.ndjson` or `.parquet`); the name of a shipped list (`emoji64`, `emoji64_pairs`, `animals`); or the folder
            or hub id of a data set. From Python also tuples, lists of dictionaries, `datasets.Dataset` and `DataFrame`.
            Columns other than the prompt's become metadata that rewards can read, and `negative_prompt` is the
            negative prompt of its row.
        val_prompts: Held-out prompts in the same forms; by default `val_size` prompts are held out of `prompts`.
        batch_size: Prompts per process and training step.
        val_batch_size: Prompts per process and validation batch; by default `batch_size`.
        val_size: Number of prompts to hold out if `val_prompts` is not given, the same ones for each seed; 0 for
            none. By default 8, or half of the prompts if there are fewer than 16.
        column: The prompt's column in files and data sets that have columns.
        split: The split of a data set.
        seed: Seed of the order; by default 0, and on the command line that of `seed_everything`.

    Raises:
        ConfigurationError: There are no prompts, or an argument is not valid.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        val_prompts: list[str] | str | None = None,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        val_size: int | None = None,
        column: str = "prompt",
        split: str = "train",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = integer_at_least("batch_size", batch_size, 1)
        self.val_batch_size = (
            batch_size if val_batch_size is None else integer_at_least("val_batch_size", val_batch_size, 1)
        )
        self.seed = 0 if seed is None else check_seed(seed)
        self._loader: PromptLoader | None = None
        everything = _read("prompts", prompts, column, split)
        if val_prompts is None:
            size = _default_val_size(everything) if val_size is None else val_size
            self.train_prompts, self.val_prompts = hold_out(everything, size, _HELD_OUT)
        else:
            self.train_prompts, self.val_prompts = everything, _read("val_prompts", val_prompts, column, split)

    def train_dataloader(self) -> PromptLoader:
        """Return shuffled batches; a loader that is recreated during training continues the order."""
        rank, size = self._process()
        module = None if self.trainer is None else self.trainer.lightning_module
        loader = PromptLoader(
            self.train_prompts,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=size,
            repeats=module.training_steps_per_batch(self.batch_size) if isinstance(module, RepeatsBatches) else 1,
            multiple=self.trainer.accumulate_grad_batches if self.trainer else 1,
        )
        loader.distinct = self._overfit_batches(len(loader))
        if self._loader is not None and self.trainer is not None and self.trainer.current_epoch > 0:
            loader.load_state_dict(self._loader.state_dict())
        self._loader = loader
        return loader

    def val_dataloader(self) -> FixedPrompts:
        """Return the held-out prompts in their order.

        Raises:
            ConfigurationError: There are fewer held-out prompts than processes.
        """
        rank, size = self._process()
        if 0 < len(self.val_prompts) < size:
            raise ConfigurationError(
                f"there are {len(self.val_prompts)} held-out prompts and {size} processes, and each process needs "
                f"one; set val_size to {size} or more"
            )
        return FixedPrompts(self.val_prompts, self.val_batch_size, rank=rank, world_size=size)

    def _process(self) -> tuple[int, int]:
        """Return the number of this process and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _overfit_batches(self, batches: int) -> int | None:
        """Return the number of batches of `Trainer(overfit_batches=...)`; a float is a fraction of an epoch."""
        limit: int | float = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        if not limit:
            return None
        return max(1, math.floor(batches * limit)) if isinstance(limit, float) else int(limit)


def hold_out(prompts: Sequence[str], size: int, seed: int) -> tuple[Sequence[str], Sequence[str]]:
    """Split prompts into training and held-out prompts; the order does not change.

    Copies of held-out prompts are excluded from the training prompts, with a warning.

    Args:
        prompts: All prompts.
        size: Number of different texts to hold out.
        seed: Seed of the choice.

    Raises:
        ConfigurationError: The size is negative, or no prompts would be left for training.
    """
    integer_at_least("val_size", size, 0, hint="write 0 to hold out nothing")
    if size == 0:
        return prompts, []
    texts = prompts.texts if isinstance(prompts, PromptTable) else prompts
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    chosen: dict[str, int] = {}
    for place in range(len(texts)):
        if len(chosen) == size:
            break
        index = int(order[place])
        chosen.setdefault(texts[index].strip(), index)
    held = set(chosen.values())
    train = [index for index, text in enumerate(texts) if text.strip() not in chosen]
    if not train or len(held) < size:
        raise ConfigurationError(
            f"val_size={size} leaves nothing to train on: there are {len({text.strip() for text in texts})} different "
            f"prompts; set val_size to a smaller number, or give val_prompts"
        )
    copies = len(prompts) - len(train) - len(held)
    if copies:
        rank_zero_warn(
            f"{copies} copies of held-out prompts are excluded from training, so that validation prompts are not "
            "trained on"
        )
    return _select(prompts, train), _select(prompts, sorted(held))


def _read(option: str, source: Any, column: str, split: str) -> Sequence[str]:
    """Read prompts; an error names the option that contains them."""
    try:
        return read_prompts(source, column, split)
    except ConfigurationError as error:
        message = str(error)
        if not isinstance(source, str):
            raise ConfigurationError(f"{option}: {message}") from error
        shown = "" if message.startswith(repr(source)) else f"{source!r}: "
        raise ConfigurationError(f"{option}={shown}{message}") from error


def _select(prompts: Sequence[str], rows: Sequence[int]) -> Sequence[str]:
    return prompts.select(rows) if isinstance(prompts, PromptTable) else [prompts[row] for row in rows]


def _default_val_size(prompts: Sequence[Any]) -> int:
    size = min(DEFAULT_VAL_SIZE, len(prompts) // 2)
    if size < DEFAULT_VAL_SIZE:
        rank_zero_info(
            f"{size} of {len(prompts)} prompts are held out for validation; set val_size or val_prompts for another "
            "split"
        )
    return size
