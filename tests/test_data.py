"""The data module of prompts: the held-out split, the order and its resumption, distributed processes, size."""

import time
import tracemalloc
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_draft.data import FixedPrompts, PromptDataModule, PromptLoader, hold_out
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.prompt import Prompt
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import LastK

PROMPTS = [Prompt(f"prompt {i}") for i in range(10)]


def test_hold_out_splits_without_loss_and_keeps_the_order() -> None:
    train, held = hold_out(PROMPTS, 3, seed=4)
    assert len(held) == 3
    assert sorted(train + held) == sorted(PROMPTS)
    assert [train, held] == [[p for p in PROMPTS if p in part] for part in (train, held)]
    assert hold_out(PROMPTS, 3, seed=4) == (train, held)
    assert {tuple(hold_out(PROMPTS, 3, seed)[1]) for seed in range(8)} != {tuple(held)}
    assert hold_out(PROMPTS, 0, seed=0) == (PROMPTS, [])
    with pytest.raises(
        ConfigurationError,
        match="val_size=10 leaves nothing .* 10 different prompts; set val_size",
    ):
        hold_out(PROMPTS, 10, seed=0)
    with pytest.raises(ConfigurationError, match="val_size=-1 must be at least 0; write 0 to hold out nothing"):
        hold_out(PROMPTS, -1, seed=0)


def test_each_epoch_contains_every_prompt_once_in_a_new_order() -> None:
    loader = PromptLoader(PROMPTS, 5)
    passes = [sum((loader.batch(2 * n + i) for i in range(2)), []) for n in range(3)]
    assert all(sorted(seen) == sorted(PROMPTS) for seen in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != sum((PromptLoader(PROMPTS, 5, seed=1).batch(i) for i in range(2)), [])
    assert PromptLoader(PROMPTS, 4, shuffle=False).batch(2) == [*PROMPTS[8:], *PROMPTS[:2]]


def test_epoch_length_is_a_multiple_of_the_accumulated_batches() -> None:
    """The order of the prompts does not change."""
    plain, longer = PromptLoader(PROMPTS, 5, repeats=3), PromptLoader(PROMPTS, 5, repeats=3, multiple=4)
    assert (len(plain), len(longer)) == (6, 8)
    assert list(longer) == [*plain, *islice(plain, 2)]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_loader_continues_at_its_position(stop: int) -> None:
    def endless(loader: PromptLoader):  # noqa: ANN202
        while True:
            yield from loader

    whole = list(islice(endless(PromptLoader(PROMPTS, 3)), 9))
    first, second = PromptLoader(PROMPTS, 3), PromptLoader(PROMPTS, 3)
    seen = list(islice(endless(first), stop))
    second.load_state_dict(first.state_dict())
    assert seen + list(islice(endless(second), 9 - stop)) == whole


def test_first_epoch_after_a_resume_has_only_its_remaining_batches() -> None:
    loader = PromptLoader(PROMPTS, 3)
    loader.load_state_dict({"position": 1})
    assert [len(list(loader)), len(list(loader))] == [2, 3]


def test_processes_share_every_batch() -> None:
    alone = PromptLoader(PROMPTS, 4)
    pair = [PromptLoader(PROMPTS, 2, rank=rank, world_size=2) for rank in range(2)]
    assert len(alone) == len(pair[0]) == 2
    for number in range(5):
        assert alone.batch(number) == pair[0].batch(number) + pair[1].batch(number)


def test_each_fixed_prompt_is_used_once_by_one_process() -> None:
    assert list(FixedPrompts(PROMPTS, 4)) == [PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:]]
    assert len(FixedPrompts(PROMPTS, 4)) == 3
    shares = [sum(FixedPrompts(PROMPTS, 2, rank=rank, world_size=3), []) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(PROMPTS)


def test_data_module_gives_training_and_validation_batches() -> None:
    data = PromptDataModule([str(prompt) for prompt in PROMPTS], val_size=4, batch_size=3, seed=1)
    assert (data.train_prompts, data.val_prompts) == hold_out(PROMPTS, 4, 0)  # the same for each seed
    assert next(iter(data.train_dataloader())) == PromptLoader(data.train_prompts, 3, seed=1).batch(0)
    assert list(data.val_dataloader()) == [data.val_prompts[:3], data.val_prompts[3:]]
    given = PromptDataModule(["a", "b"], val_prompts=["c"], val_batch_size=2)
    assert (given.train_prompts, given.val_prompts, given.val_batch_size) == (["a", "b"], ["c"], 2)


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size"])
def test_invalid_batch_sizes_are_rejected(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0 must be at least 1"):
        PromptDataModule(["a", "b"], val_size=1, **{name: 0})


def test_each_process_needs_a_held_out_prompt() -> None:
    data = PromptDataModule(["a", "b", "c"], val_prompts=["d", "e"])
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert list(data.val_dataloader()) == [["e"]]
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    with pytest.raises(ConfigurationError, match="2 held-out prompts and 3 processes.*set val_size to 3"):
        data.val_dataloader()


def test_copies_of_a_held_out_prompt_are_not_trained_on() -> None:
    prompts = ["a", "b", "a ", "c", "b", "a", "d"]
    for seed in range(6):
        with (
            pytest.warns(UserWarning, match="copies of held-out prompts") if seed in _copied(prompts) else nullcontext()
        ):
            train, held = hold_out(prompts, 2, seed)
        assert len({text.strip() for text in held}) == 2
        assert not {text.strip() for text in train} & {text.strip() for text in held}
    with pytest.raises(ConfigurationError, match="there are 4 different prompts"):
        hold_out(prompts, 4, 0)


def _copied(prompts: list[str]) -> set[int]:
    """Seeds for which one of the first two different texts occurs more than once."""
    found = set()
    for seed in range(6):
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = list(dict.fromkeys(prompts[index].strip() for index in order))[:2]
        if {"a", "b"} & set(texts):
            found.add(seed)
    return found


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (5, 2), (15, 7), (16, 8), (100, 8)])
def test_fewer_prompts_are_held_out_of_a_short_list(count: int, held: int) -> None:
    data = PromptDataModule([f"prompt {i}" for i in range(count)])
    assert (len(data.train_prompts), len(data.val_prompts)) == (count - held, held)


def test_order_is_one_permutation_per_epoch() -> None:
    loader, expected = PromptLoader(PROMPTS, 3, seed=5), []
    for epoch in range(4):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        expected += [PROMPTS[index] for index in order]
    seen = sum((loader.batch(number) for number in range(13)), [])
    assert seen == expected[:39]
    assert sum((loader.batch(number) for number in (0, 12, 0)), []) == [*expected[:3], *expected[36:39], *expected[:3]]


def test_batches_contain_prompts_with_metadata() -> None:
    for loader in (PromptLoader(["a", "b"], 2), FixedPrompts(["a", "b"], 2)):
        (batch,) = list(loader)
        assert [(type(prompt), dict(prompt.metadata)) for prompt in batch] == [(Prompt, {})] * 2


class Seen(DraftModule):
    """Records the prompts of each training step."""

    def __init__(self) -> None:
        super().__init__(LinearModel(0.1), LinearReward(), DDIM(2), LastK(1))
        self.seen: list[list[str]] = []

    def training_step(self, prompts: list[str], batch_idx: int) -> torch.Tensor:
        self.seen.append([str(prompt) for prompt in prompts])
        return super().training_step(prompts, batch_idx)


def _train(tmp_path: Path, **options: object) -> list[list[str]]:
    module, data = Seen(), PromptDataModule([str(prompt) for prompt in PROMPTS], val_size=0, batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet, **options).fit(
        module, data
    )
    return module.seen


@pytest.mark.parametrize(("overfit", "distinct"), [(1, 1), (2, 2), (0.4, 2)])
def test_overfit_batches_repeats_the_first_batches(tmp_path: Path, overfit: float, distinct: int) -> None:
    whole = _train(tmp_path, max_steps=6)
    assert _train(tmp_path, max_steps=6, overfit_batches=overfit) == (whole[:distinct] * 6)[:6]


def test_reloading_the_loader_continues_the_order(tmp_path: Path) -> None:
    whole = _train(tmp_path, max_steps=12)
    assert len({tuple(sum(whole[start : start + 5], [])) for start in (0, 5)}) == 2
    assert _train(tmp_path, max_steps=12, reload_dataloaders_every_n_epochs=1) == whole


def test_a_million_prompts_load_in_seconds_and_give_batches_in_milliseconds(tmp_path: Path) -> None:
    """Start-up below 5 s of CPU time, memory below 300 MB, a batch of 64 below 10 ms."""
    path = tmp_path / "p.txt"
    path.write_text("".join(f"a photo of animal number {number}\n" for number in range(1_000_000)))
    start = time.process_time()
    loader = PromptDataModule(str(path), batch_size=64).train_dataloader()
    loader.batch(0)
    assert time.process_time() - start < 5
    start = time.process_time()
    for number in range(100):
        loader.batch(number)
    assert time.process_time() - start < 1
    tracemalloc.start()
    try:
        held = PromptDataModule(str(path), batch_size=64)
        held.train_dataloader().batch(0)
        assert tracemalloc.get_traced_memory()[0] < 300e6
    finally:
        tracemalloc.stop()
