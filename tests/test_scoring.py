"""Scoring folders of images: prompts, tables, resumption, contact sheets, and comparisons against closed forms."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_draft.__main__ import main
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_prompts import find_prompts, list_images
from lightning_draft.rewards import Brightness, JPEGSize, PythonFunction, Reward
from lightning_draft.score_report import compare, contact_sheet, report
from lightning_draft.scoring import ScoredImage, score_folder, write_parquet
from tests.rewards.chat_server import ChatServer, gray


def folder(path: Path, levels: dict[str, int], size: tuple[int, int] = (8, 6)) -> Path:
    for name, level in levels.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (level,) * 3).save(path / name)
    return path


class Mean(Reward):
    """The mean pixel; counts the images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(list(prompts))
        return images.mean((1, 2, 3))


def test_prompts_come_from_each_source(tmp_path: Path) -> None:
    folder(tmp_path, {"a_red_cat_003.png": 0, "sub/two-dogs (2).jpg": 0, "side.PNG": 0})
    (tmp_path / "side.txt").write_text("\ufeffa bird\n in a tree\n", encoding="utf-8")
    info = PngInfo()
    info.add_text("parameters", "a horse, riding\nNegative prompt: blurry\nSteps: 20")
    Image.new("RGB", (4, 4)).save(tmp_path / "x1.png", pnginfo=info)
    exif = Image.Exif()
    exif[0x010E] = "a ship"
    Image.new("RGB", (4, 4)).save(tmp_path / "y2.jpg", exif=exif)
    files = list_images(tmp_path)
    assert files == ["a_red_cat_003.png", "side.PNG", "sub/two-dogs (2).jpg", "x1.png", "y2.jpg"]
    expected = ["a red cat", "a bird in a tree", "two dogs", "a horse, riding", "a ship"]
    assert list(find_prompts(tmp_path, files).values()) == expected
    assert find_prompts(tmp_path, files[3:], "metadata") == {"x1.png": "a horse, riding", "y2.jpg": "a ship"}
    assert find_prompts(tmp_path, files[:1], "names") == {"a_red_cat_003.png": "a red cat"}
    with pytest.raises(ConfigurationError, match="4 images have no prompt from prompts='sidecar', such as 'a_red"):
        find_prompts(tmp_path, files, "sidecar")
    table = tmp_path / "prompts.csv"
    table.write_text("file,prompt\nx1.png,a cow\nsub/two-dogs (2).jpg,dogs\n")
    assert find_prompts(tmp_path, ["x1.png", files[2]], str(table)) == {"x1.png": "a cow", files[2]: "dogs"}


def test_scores_equal_those_of_single_images_of_any_size(tmp_path: Path) -> None:
    folder(tmp_path / "in", {f"cat_{level}.png": level for level in (0, 51, 255)})
    folder(tmp_path / "in", {"dog_1.png": 102}, (20, 10))
    rows = score_folder(tmp_path / "in", {"mean": Mean(), "size": JPEGSize()}, tmp_path / "out", batch_size=2)
    assert [(row.file, row.prompt) for row in rows] == [
        ("cat_0.png", "cat"),
        ("cat_255.png", "cat"),
        ("cat_51.png", "cat"),
        ("dog_1.png", "dog"),
    ]
    assert [row.scores["mean"] for row in rows] == pytest.approx([0, 1, 0.2, 0.4])
    with (tmp_path / "out" / "scores.csv").open() as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    assert {name: float(row["size"]) for name, row in table.items()} == {row.file: row.scores["size"] for row in rows}
    write_parquet(rows, tmp_path / "scores.parquet")
    from datasets import Dataset

    assert Dataset.from_parquet(str(tmp_path / "scores.parquet"))["mean"][1] == 1.0


def test_interrupted_scoring_continues_after_the_last_row(tmp_path: Path) -> None:
    names = {f"cat_{number}.png": 10 * number for number in range(6)}
    folder(tmp_path / "in", names)
    whole = score_folder(tmp_path / "in", {"mean": Mean()}, tmp_path / "whole", batch_size=2)
    path = tmp_path / "out" / "scores.csv"
    shown: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        shown.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folder(tmp_path / "in", {"mean": Mean()}, tmp_path / "out", batch_size=2, progress=stop)
    assert shown == [(2, 6), (4, 6)]
    path.write_bytes(path.read_bytes()[:-5])
    again = Mean()
    assert score_folder(tmp_path / "in", {"mean": again}, tmp_path / "out", batch_size=2) == whole
    assert sum(map(len, again.seen)) == 3
    assert path.read_text().splitlines()[1:] == (tmp_path / "whole" / "scores.csv").read_text().splitlines()[1:]
    with pytest.raises(ConfigurationError, match="contains scores of other rewards or settings"):
        score_folder(tmp_path / "in", {"mean": Brightness()}, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "there is no folder"),
        ({}, {}, "there are no images in"),
        ({"a.png": b"not an image"}, {}, "a.png is not an image that can be read"),
        ({"123.png": None}, {}, "1 images have no prompt from prompts='auto'"),
        ({"a.png": None}, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"a.png": None}, {"prompts": "nowhere.csv"}, "there is no file 'nowhere.csv'"),
        ({"a.png": None}, {"rewards": {}}, "there are no rewards; give at least one"),
    ],
)
def test_unreadable_images_and_missing_prompts_are_named(
    tmp_path: Path, content: dict, options: dict, message: str
) -> None:
    if content is not None:
        (tmp_path / "in").mkdir()
        for name, data in content.items():
            folder(tmp_path / "in", {name: 0}) if data is None else (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ConfigurationError, match=message):
        score_folder(tmp_path / "in", **{"rewards": {"mean": Mean()}, **options})


def scored(values: Sequence[float], prompt: str = "a") -> list[ScoredImage]:
    return [ScoredImage(f"{i}.png", prompt, {"r": value}) for i, value in enumerate(values)]


def test_a_comparison_agrees_with_the_normal_approximation() -> None:
    generator = np.random.default_rng(1)
    a = generator.normal(0, 1, 400)
    difference = generator.normal(0.3, 0.5, 400)
    (found,) = compare(scored(a), scored(a + difference), resamples=4000)
    assert found.difference == pytest.approx(difference.mean())
    half = 1.96 * difference.std(ddof=1) / math.sqrt(400)
    assert found.difference_interval == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.006)
    rate = (difference > 0).mean()
    half = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert found.win_rate == pytest.approx(rate)
    assert found.win_rate_interval == pytest.approx((rate - half, rate + half), abs=0.006)
    assert "| r | " in report([found], "base", "tuned")


def test_ties_count_as_half_a_win_and_the_order_reverses_the_sign() -> None:
    first, second = scored([1, 2, 3, 4]), scored([1, 3, 2, 5])
    (found,), (reverse,) = compare(first, second), compare(second, first)
    assert (found.win_rate, reverse.win_rate) == (0.625, 0.375)
    assert found.difference == -reverse.difference == 0.25
    renamed = [ScoredImage(f"other{i}.png", row.prompt, row.scores) for i, row in enumerate(second)]
    assert compare(first, renamed) == compare(first, second)
    with pytest.raises(ConfigurationError, match="no images in common"):
        compare(first, [ScoredImage("x.png", "b", {"r": 1.0})])


def test_a_contact_sheet_is_sorted_from_best_to_worst(tmp_path: Path) -> None:
    folder(tmp_path, {f"cat_{level}.png": level for level in (200, 10, 100, 150)}, (16, 16))
    rows = score_folder(tmp_path, {"mean": Mean()})
    sheet = np.asarray(contact_sheet(tmp_path, rows, "mean", side=16, per_row=4))
    assert [int(sheet[8, 16 * i + 8, 0]) for i in range(4)] == [200, 150, 100, 10]
    few = np.asarray(contact_sheet(tmp_path, rows, "mean", most=2, side=16, per_row=2))
    assert [int(few[8, 16 * i + 8, 0]) for i in range(2)] == [200, 10]


def test_the_command_scores_and_compares_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "base", {f"cat_{i}.png": 10 * i for i in range(4)})
    folder(tmp_path / "tuned", {f"cat_{i}.png": 10 * i + 20 for i in range(4)})
    (tmp_path / "r.yaml").write_text("bright:\n  class_path: Brightness\n  init_args: {target: 1.0}\n")
    output = tmp_path / "out"
    arguments = [str(tmp_path / "base"), str(tmp_path / "tuned"), "--reward", "Sharpness", "--parquet"]
    assert main(["score", *arguments, "--rewards", str(tmp_path / "r.yaml"), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.endswith((output / "comparison.md").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| bright"))
    levels = np.arange(4) * 10 / 255
    difference = ((levels - 1) ** 2 - (levels + 20 / 255 - 1) ** 2).mean()
    assert f"| {difference:+.4g} |" in row
    assert "| 100.0% |" in row
    assert {path.name for path in (output / "1-base").iterdir()} == {
        *("scores.csv", "scores.parquet", "rewards.json"),
        *("contact_sheet_Sharpness.png", "contact_sheet_bright.png"),
    }


def test_the_command_prints_what_a_judge_has_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder(tmp_path / "in", {f"cat_{i}.png": 40 * i for i in range(3)})
    server = ChatServer(lambda text, images: f"{1 + 4 * gray(images[0]):.2f}")
    endpoint = {"url": server.url, "model": "tiny", "cache": str(tmp_path / "cache"), "input_price": 1.0}
    config = {"judge": {"class_path": "VLMJudge", "init_args": {"endpoint": endpoint}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(config))
    for output, used in (("one", "requests 3, cached 0, input_tokens 300"), ("two", "requests 0, cached 3")):
        arguments = ["--rewards", str(tmp_path / "r.yaml"), "--output", str(tmp_path / output)]
        assert main(["score", str(tmp_path / "in"), *arguments]) == 0
        assert f"judge used: {used}" in capsys.readouterr().out
    described = json.loads((tmp_path / "one" / "rewards.json").read_text())["judge"]
    assert "'model': 'tiny'" in described
    assert "Rate how well" in described


def test_the_command_compares_pairs_with_a_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge prefers brighter images: the second folder wins three of four pairs, of images of different sizes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder(tmp_path / "base", {f"cat_{i}.png": 100 for i in range(4)})
    folder(tmp_path / "tuned", {f"cat_{i}.png": level for i, level in enumerate((200, 0, 150, 120))}, (16, 16))

    def answer(text: str, images: list[Image.Image]) -> str:
        return "3" if len(images) == 1 else ("A" if gray(images[0]) > gray(images[1]) else "B")

    server = ChatServer(answer)
    config = {"judge": {"class_path": "VLMJudge", "init_args": {"endpoint": {"url": server.url, "model": "m"}}}}
    config["judge"]["init_args"]["endpoint"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "out"
    arguments = ["--rewards", str(tmp_path / "r.yaml"), "--output", str(output), "--pairwise"]
    assert main(["score", str(tmp_path / "base"), str(tmp_path / "tuned"), *arguments]) == 0
    assert "| judge | 4 | 75.0% | 25.0% to 100.0% |" in capsys.readouterr().out
    rows = list(csv.DictReader((output / "pairs_judge.csv").open()))
    assert [float(row["preference_for_second"]) for row in rows] == [1.0, 0.0, 1.0, 1.0]
    assert "| judge | 4 | 75.0%" in (output / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FOLDER"),
        (["a"], "there are no rewards; write --reward NAME"),
        (["a", "--reward", "HPSv3"], "--rewards: there is no Reward 'HPSv3'; did you mean HPSv2"),
        (["a", "--reward", "Sharpness"], "there is no folder 'a'"),
        (["a", "b", "c", "--reward", "Sharpness"], "3 folders were given; give one, or two to compare"),
        (
            ["a", "b", "--reward", "Sharpness", "--pairwise"],
            "--pairwise compares two folders with rewards that compare",
        ),
        (["a", "--rewards", "nowhere.yaml"], "--rewards nowhere.yaml cannot be read"),
    ],
)
def test_the_command_reports_invalid_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rewards_compute_without_gradients_and_in_eval_mode(tmp_path: Path) -> None:
    folder(tmp_path, {"cat.png": 100})
    enabled: list[bool] = []

    def judge(images: object, prompts: list[str]) -> list[float]:
        enabled.append(torch.is_grad_enabled())
        return [1.0]

    score_folder(tmp_path, {"judge": PythonFunction(judge)})
    assert enabled == [False]
