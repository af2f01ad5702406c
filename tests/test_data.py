"""Prompts: every source, the held-out split, the order and its resuming, the processes of a distributed run."""

import json
from collections.abc import Callable
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from lightning_draft.data import FixedPrompts, PromptDataModule, PromptLoader, hold_out
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt_sources import read_prompts, shipped_lists
from lightning_draft.rewards.base import Prompt

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
        (_saved, "saved", [2, 1]),
        (_folder, "folder", [2, 1]),
    ],
)
def test_every_source_yields_the_same_prompts(
    write: Callable[[Path], Path], name: str, counts: list[object], tmp_path: Path
) -> None:
    prompts = read_prompts(str(write(tmp_path / name)))
    assert prompts == ["two cats", "a bed"]
    assert [prompt.metadata.get("count") for prompt in prompts] == counts
    assert all("prompt" not in prompt.metadata for prompt in prompts)


def test_lists_and_json_of_strings(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a cat", "a dog"]')
    assert read_prompts(str(tmp_path / "p.json")) == read_prompts(["a cat", "a dog"]) == ["a cat", "a dog"]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("caption,kind\na cat,animal\n")
    (prompt,) = read_prompts(str(tmp_path / "p.csv"), column="caption")
    assert (prompt, prompt.metadata) == ("a cat", {"kind": "animal"})


def test_every_shipped_list_is_read_whole_and_without_repetition() -> None:
    assert {"animals", "emoji_names", "emoji_all_names"} <= set(shipped_lists())
    for name in shipped_lists():
        columns = name.endswith("_names")
        file = files("lightning_draft") / "prompts" / f"{name}.{'csv' if columns else 'txt'}"
        lines = file.read_text(encoding="utf-8").splitlines()[int(columns) :]
        assert read_prompts(name) == [line.split(",")[0] for line in lines]
        assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("name", ["emoji_names", "emoji_all_names"])
def test_bare_names_come_with_a_caption_that_the_model_knows(name: str) -> None:
    names = read_prompts(name)
    captions = [prompt.metadata["caption"] for prompt in names]
    assert captions == [f"twemoji {name}" for name in names]
    assert set(captions) <= set(read_prompts("emoji"))
    assert not set(names) & set(read_prompts("emoji"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\n \n", "no prompts in"),
        ("p.txt", b"\xff\xfe\xfa", "not text in UTF-8"),
        ("p.json", b"[1", "is not JSON"),
        ("p.json", b'{"prompt": "a cat"}', "must hold a list"),
        ("p.jsonl", b'"a cat"\n', "where a row"),
        ("p.jsonl", b'{"text": "a cat"}\n', "no column 'prompt'; it has text"),
        ("p.jsonl", b'{"prompt": 3}\n', "prompts are text"),
        ("p.csv", b"text\na cat\n", "no column 'prompt'"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "no prompts in ''"),
        ("nowhere.txt", "there is no file 'nowhere.txt'"),
        ("./nowhere", "there is no file or folder"),
        ("annimals", "did you mean animals"),
        ("a red cat", r"as a list: \[a red cat\]"),
        ("nobody/nothing-of-this-name", "could not be read"),
    ],
)
def test_a_source_that_is_not_there(source: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_prompts(source)


def test_hold_out_splits_without_loss_and_keeps_the_order() -> None:
    train, held = hold_out(PROMPTS, 3, seed=4)
    assert len(held) == 3
    assert sorted(train + held) == sorted(PROMPTS)
    assert [train, held] == [[p for p in PROMPTS if p in part] for part in (train, held)]
    assert hold_out(PROMPTS, 3, seed=4) == (train, held)
    assert {tuple(hold_out(PROMPTS, 3, seed)[1]) for seed in range(8)} != {tuple(held)}
    assert hold_out(PROMPTS, 0, seed=0) == (PROMPTS, [])
    with pytest.raises(ConfigurationError, match="val_size=10 of 10 in all leaves nothing"):
        hold_out(PROMPTS, 10, seed=0)
    with pytest.raises(ConfigurationError, match="val_size=-1 must not be negative"):
        hold_out(PROMPTS, -1, seed=0)


def test_each_pass_sees_every_prompt_once_in_a_new_order() -> None:
    loader = PromptLoader(PROMPTS, 5)
    passes = [sum((loader.batch(2 * n + i) for i in range(2)), []) for n in range(3)]
    assert all(sorted(seen) == sorted(PROMPTS) for seen in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != sum((PromptLoader(PROMPTS, 5, seed=1).batch(i) for i in range(2)), [])
    assert PromptLoader(PROMPTS, 4, shuffle=False).batch(2) == [*PROMPTS[8:], *PROMPTS[:2]]


def test_a_pass_is_whole_optimiser_steps() -> None:
    """Longer than the prompts need, and the order goes on as ever."""
    plain, longer = PromptLoader(PROMPTS, 5, repeats=3), PromptLoader(PROMPTS, 5, repeats=3, multiple=4)
    assert (len(plain), len(longer)) == (6, 8)
    assert list(longer) == [*plain, *islice(plain, 2)]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_loader_goes_on_where_it_was(stop: int) -> None:
    def endless(loader: PromptLoader):  # noqa: ANN202
        while True:
            yield from loader

    whole = list(islice(endless(PromptLoader(PROMPTS, 3)), 9))
    first, second = PromptLoader(PROMPTS, 3), PromptLoader(PROMPTS, 3)
    seen = list(islice(endless(first), stop))
    second.load_state_dict(first.state_dict())
    assert seen + list(islice(endless(second), 9 - stop)) == whole


def test_processes_share_every_batch() -> None:
    alone = PromptLoader(PROMPTS, 4)
    pair = [PromptLoader(PROMPTS, 2, rank=rank, world_size=2) for rank in range(2)]
    assert len(alone) == len(pair[0]) == 2
    for number in range(5):
        assert alone.batch(number) == pair[0].batch(number) + pair[1].batch(number)


def test_fixed_prompts_are_seen_once_by_one_process() -> None:
    assert list(FixedPrompts(PROMPTS, 4)) == [PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:]]
    assert len(FixedPrompts(PROMPTS, 4)) == 3
    shares = [sum(FixedPrompts(PROMPTS, 2, rank=rank, world_size=3), []) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(PROMPTS)


def test_data_module() -> None:
    data = PromptDataModule([str(prompt) for prompt in PROMPTS], val_size=4, batch_size=3, seed=1)
    assert (data.train_prompts, data.val_prompts) == hold_out(PROMPTS, 4, 1)
    assert next(iter(data.train_dataloader())) == PromptLoader(data.train_prompts, 3, seed=1).batch(0)
    assert list(data.val_dataloader()) == [data.val_prompts[:3], data.val_prompts[3:]]
    given = PromptDataModule(["a", "b"], val_prompts=["c"], val_batch_size=2)
    assert (given.train_prompts, given.val_prompts, given.val_batch_size) == (["a", "b"], ["c"], 2)


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size"])
def test_batch_sizes_are_checked(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0 must be at least 1"):
        PromptDataModule(["a", "b"], val_size=1, **{name: 0})


def test_held_out_prompts_go_round_the_processes() -> None:
    data = PromptDataModule(["a", "b", "c"], val_prompts=["d", "e"])
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert list(data.val_dataloader()) == [["e"]]
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    with pytest.raises(ConfigurationError, match="2 held-out prompts do not go round 3 processes"):
        data.val_dataloader()
