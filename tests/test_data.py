"""Prompts: sources, files, the held-out split, the order and its resumption, distributed processes, size."""

import json
import pickle
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_draft.data import FixedPrompts, PromptDataModule, PromptLoader, hold_out
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.prompt import Columns, Prompt
from lightning_draft.prompt_sources import read_prompts, shipped_lists
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import LastK

ROWS = [{"prompt": "two cats", "count": 2}, {"prompt": "a bed", "count": 1}]
PROMPTS = [Prompt(f"prompt {i}") for i in range(10)]


def _text(path: Path) -> Path:
    path.write_text("two cats\n\n  a bed  \n", encoding="utf-8")
    return path


def _jsonl(path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return path


def _json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def _csv(path: Path) -> Path:
    path.write_text("prompt,count\ntwo cats,2\na bed,1\n", encoding="utf-8")
    return path


def _tsv(path: Path) -> Path:
    path.write_text("prompt\tcount\ntwo cats\t2\na bed\t1\n", encoding="utf-8")
    return path


def _parquet(path: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(str(path))
    return path


def _saved(path: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    _jsonl(path / "train.jsonl")
    return path


@pytest.mark.parametrize(
    ("write", "name", "counts"),
    [
        (_text, "p.txt", [None, None]),
        (_jsonl, "p.jsonl", [2, 1]),
        (_json, "p.json", [2, 1]),
        (_csv, "p.csv", ["2", "1"]),
        (_text, "p.TXT", [None, None]),
        (_csv, "p.Csv", ["2", "1"]),
        (_tsv, "p.tsv", ["2", "1"]),
        (_jsonl, "p.ndjson", [2, 1]),
        (_parquet, "p.parquet", [2, 1]),
        (_saved, "saved", [2, 1]),
        (_folder, "folder", [2, 1]),
    ],
)
def test_all_sources_yield_the_same_prompts(
    write: Callable[[Path], Path], name: str, counts: list[object], tmp_path: Path
) -> None:
    prompts = read_prompts(str(write(tmp_path / name)))
    assert prompts == ["two cats", "a bed"]
    metadata = [getattr(prompt, "metadata", {}) for prompt in prompts]
    assert [row.get("count") for row in metadata] == counts
    assert all("prompt" not in row for row in metadata)


def test_lists_and_json_files_of_strings_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a cat", "a dog"]')
    assert read_prompts(str(tmp_path / "p.json")) == read_prompts(["a cat", "a dog"]) == ["a cat", "a dog"]


def test_the_column_of_the_prompt_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("caption,kind\na cat,animal\n")
    (prompt,) = read_prompts(str(tmp_path / "p.csv"), column="caption")
    assert (prompt, prompt.metadata) == ("a cat", {"kind": "animal"})


def test_shipped_lists_are_read_completely_without_duplicates() -> None:
    assert {"animals", "emoji64", "emoji64_scenes"} <= set(shipped_lists())
    for name in shipped_lists():
        file = files("lightning_draft") / "prompts" / f"{name}.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        assert read_prompts(name) == lines
        assert len(set(lines)) == len(lines)


CONTENTS = {
    "one column, text with a comma": ("p.csv", "prompt\na cat, sitting on a mat\n", ["a cat, sitting on a mat"]),
    "one column, quoted": ("p.csv", 'prompt\n"a cat, sitting"\n', ["a cat, sitting"]),
    "one column, quoted start": ("p.csv", 'prompt\n"a cat", sitting\n', ['"a cat", sitting']),
    "trailing comma": ("p.csv", "prompt,count\na cat,1,\n", ["a cat"]),
    "empty rows": ("p.csv", "prompt,count\n\na cat,1\n,\n", ["a cat"]),
    "spaces in the header": ("p.csv", "prompt, count\na cat,1\n", ["a cat"]),
    "two lines in quotes": ("p.csv", 'prompt,n\n"a\ncat",1\na dog,2\n', ["a\ncat", "a dog"]),
    "carriage returns": ("p.csv", "prompt,n\r\na cat,1\r\n", ["a cat"]),
    "long field": ("p.csv", f"prompt,n\n{'x' * 200_000},1\n", ["x" * 200_000]),
    "byte order mark in text": ("p.txt", "\ufeffa cat\n", ["a cat"]),
    "byte order mark in CSV": ("p.csv", "\ufeffprompt,n\na cat,1\n", ["a cat"]),
    "byte order mark in JSON": ("p.json", '\ufeff["a cat"]', ["a cat"]),
    "byte order mark in JSON lines": ("p.jsonl", '\ufeff{"prompt": "a cat"}\n', ["a cat"]),
    "line separators in text": ("p.txt", "a\u2028cat\na\x85dog\n", ["a\u2028cat", "a\x85dog"]),
    "line separators in JSON lines": ("p.jsonl", '{"prompt": "a\u2028cat"}\n', ["a\u2028cat"]),
    "line separators in CSV": ("p.csv", "prompt,n\na\u2028cat,1\n", ["a\u2028cat"]),
    "old Mac line ends": ("p.txt", "a cat\ra dog\r", ["a cat", "a dog"]),
    "strings in JSON lines": ("p.jsonl", '"a cat"\n"a dog"\n', ["a cat", "a dog"]),
    "no line end": ("p.txt", "a cat", ["a cat"]),
    "duplicates": ("p.txt", "a cat\na cat\n", ["a cat", "a cat"]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_are_read_in_their_format(name: str, tmp_path: Path) -> None:
    file, content, expected = CONTENTS[name]
    (tmp_path / file).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / file)) == read_prompts(tmp_path / file) == expected


OBJECTS: dict[str, object] = {
    "prompt table": read_prompts([{"prompt": "two cats", "count": 2}, {"prompt": "a bed", "count": 1}]),
    "list": ["two cats", "a bed"],
    "tuple": ("two cats", "a bed"),
    "prompts": [Prompt("two cats", {"count": 2}), "a bed"],
    "rows": ROWS,
    "data set": Dataset.from_list(ROWS),
    "table": pd.DataFrame(ROWS),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_python_objects_are_accepted(name: str) -> None:
    prompts = read_prompts(OBJECTS[name])
    assert prompts == ["two cats", "a bed"]
    if name not in ("list", "tuple"):
        assert prompts[0].metadata["count"] == 2


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
    assert (data.train_prompts, data.val_prompts) == hold_out(PROMPTS, 4, 1)
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


def test_columns_are_a_compact_mapping() -> None:
    columns = Columns(("count", "kind"), (2, "cat"))
    assert columns == {"count": 2, "kind": "cat"}
    assert (columns.get("no"), repr(columns), len(columns)) == (None, "{'count': 2, 'kind': 'cat'}", 2)
    prompt = Prompt("a cat", columns)
    assert prompt.metadata is columns
    assert pickle.loads(pickle.dumps(prompt)).metadata == columns
    with pytest.raises(KeyError, match="no"):
        columns["no"]


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


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_row_with_metadata_takes_less_than_300_bytes(suffix: str, tmp_path: Path) -> None:
    """A million rows with three columns of metadata fit in 300 MB."""
    rows = pd.DataFrame({"prompt": [f"a photo of animal number {n}" for n in range(20_000)]})
    rows = rows.assign(count=rows.index % 7, target="animal", weight=rows.index / 7)
    path = tmp_path / f"p.{suffix}"
    {
        "jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        "csv": lambda: rows.to_csv(path, index=False),
        "parquet": lambda: rows.to_parquet(path),
    }[suffix]()
    read_prompts(str(path))  # imports
    tracemalloc.start()
    try:
        data = PromptDataModule(str(path), val_size=8)
        assert tracemalloc.get_traced_memory()[0] < 300 * len(rows)
    finally:
        tracemalloc.stop()
    last = data.train_prompts[-1]
    number = int(last.rsplit(" ", 1)[1])
    assert {name: str(value)[:6] for name, value in last.metadata.items()} == {
        "count": str(number % 7),
        "target": "animal",
        "weight": str(number / 7)[:6],
    }


def test_rows_with_different_columns_keep_their_own_metadata(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", **({} if n % 3 == 0 else {"ab"[n % 2]: n})} for n in range(3000)]
    rows[5] = "a string"
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(str(tmp_path / "p.jsonl"))
    assert [prompts[n] for n in (5, 2998)] == ["a string", "p2998"]
    assert [getattr(prompt, "metadata", {}) for prompt in prompts] == [
        {} if isinstance(row, str) else {key: value for key, value in row.items() if key != "prompt"} for row in rows
    ]
    train, held = hold_out(prompts, 10, seed=0)
    assert {prompt: getattr(prompt, "metadata", {}) for prompt in [*train, *held]} == {
        prompt: getattr(prompt, "metadata", {}) for prompt in prompts
    }
    assert prompts[10:2000:7] == [*prompts][10:2000:7] != prompts
