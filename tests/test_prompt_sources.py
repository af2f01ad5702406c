"""Sources of prompts: files in their formats, objects, columns, and their size in memory."""

import json
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from lightning_draft.data import PromptDataModule, hold_out
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import Columns, Prompt, metadata_of
from lightning_draft.prompt_sources import read_prompts, shipped_lists

ROWS = [{"prompt": "two cats", "count": 2}, {"prompt": "a bed", "count": 1}]


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


@pytest.mark.parametrize("empty", [None, float("nan"), pd.NA])
def test_an_empty_negative_prompt_is_none(empty: object, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "negative_prompt": "red"}, {"prompt": "a dog", "negative_prompt": empty}]
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "p.parquet")
    for source in (rows, table, tmp_path / "p.parquet"):
        assert [each.metadata["negative_prompt"] for each in read_prompts(source)] == ["red", None]


@pytest.mark.parametrize("value", [3, float("inf"), ["red"], True])
def test_a_negative_prompt_that_is_no_text_is_rejected_with_its_row(value: object, tmp_path: Path) -> None:
    table = pd.DataFrame([{"prompt": "a cat", "negative_prompt": value}])
    table.to_parquet(tmp_path / "p.parquet")
    for source in (table, tmp_path / "p.parquet"):
        with pytest.raises(ConfigurationError, match="row 1 has .* in the column 'negative_prompt'; .* can be empty"):
            read_prompts(source)


@pytest.mark.parametrize("name", ["negativ_prompt", "negative_prompts", "Negative Prompt", "neg_prompt"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_almost_named_negative_prompt_is_one_warning(name: str, suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", name: "blurry"}, {"prompt": "a bed", name: ""}, {"prompt": "a deer", "count": 1}]
    file = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="not read as") as seen:
        first = read_prompts(str(file))[0]
    (message,) = {str(each.message) for each in seen}
    assert f"the column {name!r} of the prompts is not read as 'negative_prompt'" in message
    assert len(seen) == 1
    assert metadata_of(first)[name] == "blurry"


@pytest.mark.parametrize("names", [["negative_prompt"], ["negative_prompt", "negative_prompt_2"], ["objects", "id"]])
def test_other_columns_give_no_warning(names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_prompts([{"prompt": "a cat", **dict.fromkeys(names, "a")}])
        read_prompts([{"prompt": "a cat", "positive_prompt": "a", "original_prompt": "a"}])


def test_columns_are_a_compact_mapping() -> None:
    columns = Columns(("count", "kind"), (2, "cat"))
    assert columns == {"count": 2, "kind": "cat"}
    assert (columns.get("no"), repr(columns), len(columns)) == (None, "{'count': 2, 'kind': 'cat'}", 2)
    prompt = Prompt("a cat", columns)
    assert prompt.metadata is columns
    assert pickle.loads(pickle.dumps(prompt)).metadata == columns
    with pytest.raises(KeyError, match="no"):
        columns["no"]


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
