"""Prompt data module and loaders: batches, order, and the split into training and validation prompts."""

from collections.abc import Iterator, Sequence

import lightning as L
import torch

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt_sources import read_prompts
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
        asked = getattr(self.trainer and self.trainer.lightning_module, "training_steps_per_batch", None)
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
