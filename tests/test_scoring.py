"""Scoring folders of images: prompts, tables, resumption, contact sheets, and comparisons against closed forms."""

import csv
import json
import math
import os
import signal
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_draft.__main__ import main
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_files import image_size, list_images, read_image
from lightning_draft.image_prompts import find_prompts
from lightning_draft.pairwise_score import compare_pairs
from lightning_draft.prompt import metadata_of
from lightning_draft.rewards import Brightness, JPEGSize, PairwiseReward, PythonFunction, Reward
from lightning_draft.score_report import compare, contact_sheet, report
from lightning_draft.score_table import ScoredImage, write_parquet
from lightning_draft.scoring import score_folder
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
    with pytest.raises(ConfigurationError, match="4 of 5 .* no prompt in the source prompts='sidecar', such as 'a_red"):
        find_prompts(tmp_path, files, "sidecar")
    table = tmp_path / "prompts.csv"
    table.write_text("file,prompt\nx1.png,a cow\nsub/two-dogs (2).jpg,dogs\n")
    assert find_prompts(tmp_path, ["x1.png", files[2]], str(table)) == {"x1.png": "a cow", files[2]: "dogs"}
    table.write_text(f"file_name,prompt,count\n{tmp_path / 'x1.png'},two  cows,2\n")
    (prompt,) = find_prompts(tmp_path, ["x1.png"], str(table)).values()
    assert (prompt, dict(metadata_of(prompt))["count"]) == ("two cows", "2")
    table.write_text("file,prompt\nx1.png,a cow\nx1.png,a pig\n")
    with pytest.raises(ConfigurationError, match="has two prompts for 'x1.png': 'a cow' and 'a pig'"):
        find_prompts(tmp_path, ["x1.png"], str(table))
    assert find_prompts(tmp_path, files[:1], "none") == {files[0]: ""}


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
    assert shown == [(0, 6), (2, 6), (4, 6)]
    path.write_bytes(path.read_bytes()[:-5])
    again = Mean()
    assert score_folder(tmp_path / "in", {"mean": again}, tmp_path / "out", batch_size=2) == whole
    assert sum(map(len, again.seen)) == 3
    assert path.read_text().splitlines()[1:] == (tmp_path / "whole" / "scores.csv").read_text().splitlines()[1:]
    Image.new("RGB", (8, 6), "white").save(tmp_path / "in" / "cat_0.png")
    os.utime(tmp_path / "in" / "cat_0.png", (0, 0))
    rows = score_folder(tmp_path / "in", {"mean": Mean()}, tmp_path / "out")
    assert [row.scores["mean"] for row in rows] == [1.0, *(row.scores["mean"] for row in whole[1:])]
    assert len(path.read_text().splitlines()) == 7


def test_scores_of_another_folder_other_rewards_or_other_weights_are_not_continued(tmp_path: Path) -> None:
    folder(tmp_path / "in", {"cat_1.png": 0})
    folder(tmp_path / "other", {"cat_1.png": 255})
    convolution = torch.nn.Conv2d(3, 1, 1)

    class Network(Mean):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

    out = tmp_path / "out"
    score_folder(tmp_path / "in", {"mean": Network(convolution)}, out)
    score_folder(tmp_path / "in", {"mean": Network(deepcopy(convolution))}, out)
    with pytest.raises(ConfigurationError, match=r"contains scores of the folder .*in; choose another folder"):
        score_folder(tmp_path / "other", {"mean": Network(convolution)}, out)
    for reward in (Network(torch.nn.Conv2d(3, 1, 1)), Brightness()):
        with pytest.raises(ConfigurationError, match="contains scores of other rewards, settings or votes"):
            score_folder(tmp_path / "in", {"mean": reward}, out)


def picture() -> Image.Image:
    """Return an image without symmetry."""
    image = Image.new("RGB", (24, 16), (200, 60, 40))
    image.paste((20, 200, 30), (0, 0, 12, 8))
    return image


def test_unusual_files_are_read_as_they_are_displayed(tmp_path: Path) -> None:
    """Each file is compared with the array that an image viewer shows."""
    plain = np.asarray(picture()).astype(int)
    levels = np.linspace(0, 255, 24 * 16).reshape(16, 24).round()
    half = np.full((16, 24), 128, np.uint8)
    transparent = picture().convert("RGBA")
    transparent.putalpha(Image.fromarray(half))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the viewer rotates by 90 degrees clockwise
    shades = np.repeat(levels[..., None], 3, 2)
    cases = {
        "cmyk.JPG": (picture().convert("CMYK"), {"quality": 95}, plain),
        "sixteen.png": (Image.fromarray((levels * 257).astype(np.uint16)), {}, shades),
        "sixteen.tif": (Image.fromarray((levels * 257).astype(np.uint16)), {}, shades),
        "alpha.PNG": (transparent, {}, plain * 128 / 255 + 255 * 127 / 255),
        "turned.jpeg": (picture(), {"exif": turned, "quality": 95, "subsampling": 0}, np.rot90(plain, -1)),
        "palette.gif": (picture().convert("P", palette=Image.Palette.ADAPTIVE), {}, plain),
        "bits.bmp": (Image.fromarray(half).convert("1", dither=Image.Dither.NONE), {}, np.full((16, 24, 3), 255)),
        "photo.webp": (picture(), {"lossless": True}, plain),
        "scan.tiff": (picture(), {}, plain),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / name, **options)
        found = np.asarray(read_image(tmp_path / name)).astype(int)
        assert image_size(tmp_path / name) == (expected.shape[1], expected.shape[0]), name
        assert np.abs(found - expected).mean() < 2, name
    rows = score_folder(tmp_path, {"mean": Mean()}, batch_size=4)
    assert {row.file for row in rows} == cases.keys()


def test_linked_files_and_folders_are_read_once(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", {"dog.png": 50})
    folder(tmp_path / "in", {"cat.png": 100, ".hidden.png": 0})
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "copy.png").symlink_to("cat.png")
    (tmp_path / "in" / "linked" / "loop").symlink_to(tmp_path / "in")
    assert list_images(tmp_path / "in") == ["cat.png", "copy.png", "linked/dog.png"]


def test_files_that_are_no_images_stop_scoring_or_are_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    folder(tmp_path, {"good.png": 100})
    folder(tmp_path, {"huge.png": 100}, (20, 20))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-60])
    with pytest.warns(UserWarning, match="left out") as warned:
        rows = score_folder(tmp_path, {"mean": Mean()}, tmp_path / "out", unreadable="skip")
    assert [row.file for row in rows] == ["good.png"]
    messages = "\n".join(sorted(str(each.message).replace(f"{tmp_path}/", "") for each in warned))
    for reason in (
        "cut.png is not an image that can be read: image file is truncated",
        "empty.png is not an image that can be read: it is empty",
        "gone.png is not an image that can be read: it is a link to nowhere.png, which does not exist",
        "huge.png is not an image that can be read: Image size (400 pixels) exceeds limit of 200 pixels",
        "text.png is not an image that can be read: its content is not that of an image",
    ):
        assert f"left out: {reason}" in messages
    with pytest.raises(
        ConfigurationError, match="is not an image that can be read: .*, or leave such files out with unreadable=skip"
    ):
        score_folder(tmp_path, {"mean": Mean()}, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "there is no folder"),
        ({}, {}, "there are no images in"),
        ({"a.png": b"not an image"}, {}, "a.png is not an image that can be read"),
        ({"123.png": None}, {}, "1 of 1 images have no prompt in the source prompts='auto'"),
        ({"a.png": None}, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"a.png": None}, {"prompts": "nowhere.csv"}, "there is no file 'nowhere.csv'"),
        ({"a.png": None}, {"device": "cuda:9"}, "device='cuda:9' cannot be used: .*; write cpu or auto"),
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


def test_file_names_that_are_not_text_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "in", {"e_1.png": 0})
    (tmp_path / "in" / "e_1.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9_1.png"))
    with pytest.raises(ConfigurationError, match="the file name 'caf.*_1.png' in .* is not in UTF-8; rename the file"):
        score_folder(tmp_path / "in", {"mean": Mean()})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores.csv", b"\xff\n"),
        ("scores.csv", b"file,prompt,modified,mean\n" + b"a" * 200_000 + b",x,,1\n"),
        ("scoring.json", b"{bad"),
        ("scoring.json", b"\xff"),
    ],
    ids=["bytes", "long field", "json", "bytes of json"],
)
def test_damaged_files_of_an_earlier_scoring_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder(tmp_path / "in", {"a_1.png": 0})
    score_folder(tmp_path / "in", {"mean": Mean()}, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{name} is damaged .*; delete it"):
        score_folder(tmp_path / "in", {"mean": Mean()}, tmp_path / "out")


def test_a_service_that_gives_no_scores_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "in", {"a_1.png": 0})
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("http: {class_path: HTTPReward, init_args: {url: 'http://127.0.0.1:9', retries: 0}}")
    assert main(["score", "in", "--rewards", "r.yaml"]) == 1
    assert "http://127.0.0.1:9 gave no scores for " in capsys.readouterr().err


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


def test_images_of_one_prompt_are_resampled_together() -> None:
    """With equal differences within a prompt, the interval is that of one pair per prompt."""
    generator = np.random.default_rng(2)
    per_prompt = generator.normal(0.2, 1, 40)
    one = [ScoredImage(f"{i}.png", f"p{i}", {"r": d}) for i, d in enumerate(per_prompt)]
    many = [ScoredImage(f"{i}_{k}.png", f"p{i}", {"r": d}) for i, d in enumerate(per_prompt) for k in range(5)]
    (single,), (clustered,) = (compare([zeroed(row) for row in rows], rows) for rows in (one, many))
    assert (single.sampled, clustered.sampled, clustered.pairs) == ("40 prompts", "40 prompts", 200)
    assert clustered.difference_interval == pytest.approx(single.difference_interval)
    assert "by bootstrap over the 40 prompts" in report([clustered], "a", "b")


def zeroed(row: ScoredImage) -> ScoredImage:
    return ScoredImage(row.file, row.prompt, {"r": 0.0})


def test_the_interval_of_a_win_rate_of_1_is_exact() -> None:
    (found,) = compare(scored([0.0] * 8), scored([1.0] * 9))
    low, high = found.win_rate_interval
    assert low**8 == pytest.approx(0.025)
    assert high == 1.0
    assert "Images without a counterpart, not compared: 1 of b." in report([found], "a", "b")


def test_other_suffixes_are_paired_by_name() -> None:
    first = [ScoredImage(f"{i}.png", "a", {"r": float(i)}) for i in range(4)]
    second = [ScoredImage(f"{i}.jpg", "a", {"r": float(i) + 1}) for i in (3, 1, 2, 0)]
    (found,) = compare(first, second)
    assert found.difference_interval == (1.0, 1.0)


def test_a_contact_sheet_is_sorted_from_best_to_worst(tmp_path: Path) -> None:
    folder(tmp_path, {f"cat_{level}.png": level for level in (200, 10, 100, 150)}, (16, 16))
    rows = score_folder(tmp_path, {"mean": Mean()})
    sheet = np.asarray(contact_sheet(tmp_path, rows, "mean", side=16, per_row=4))
    assert [int(sheet[8, 20 * i + 8, 0]) for i in range(4)] == [200, 150, 100, 10]
    few = np.asarray(contact_sheet(tmp_path, rows, "mean", most=2, side=16, per_row=2))
    assert [int(few[8, 20 * i + 8, 0]) for i in range(2)] == [200, 10]


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
        *("scores.csv", "scores.parquet", "scoring.json"),
        *("contact_sheet_Sharpness.png", "contact_sheet_bright.png"),
    }


def test_ctrl_c_keeps_the_rows_and_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "in", {f"cat_{i}.png": 10 * i for i in range(4)})
    arguments = ["score", str(tmp_path / "in"), "--reward", "Sharpness", "--output", str(tmp_path / "out")]
    calls: list[int] = []

    def interrupted(self: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if calls:
            signal.raise_signal(signal.SIGINT)
        calls.append(len(prompts))
        return images.mean((1, 2, 3))

    with monkeypatch.context() as patch:
        patch.setattr("lightning_draft.rewards.Sharpness.forward", interrupted)
        assert main([*arguments, "--batch_size", "2"]) == 130
    assert "the finished rows are in" in capsys.readouterr().err
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 3
    assert main(arguments) == 0
    assert "continuing after 2 images" in capsys.readouterr().err


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
    described = str(json.loads((tmp_path / "one" / "scoring.json").read_text())["rewards"]["judge"])
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


class Brighter(PairwiseReward):
    """Prefer brighter images, and record the number of pairs of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def prefer(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> torch.Tensor:
        self.calls.append(len(prompts))
        return torch.tensor([float(gray(a) > gray(b)) for a, b in zip(first, second, strict=True)])


def test_pairs_are_compared_in_chunks_with_the_same_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = (200, 0, 150, 120, 30)
    folder(tmp_path / "base", {f"cat_{i}.png": 100 for i in range(5)})
    folder(tmp_path / "tuned", {f"cat_{i}.png": level for i, level in enumerate(levels)})
    judge = Brighter()
    folders = [tmp_path / "base", tmp_path / "tuned"]
    rows = [score_folder(each, {"judge": judge}) for each in folders]
    monkeypatch.setattr("lightning_draft.pairwise_score.PAIRS_PER_CALL", 2)
    (found,) = compare_pairs(folders, rows, {"judge": judge}, tmp_path)
    assert judge.calls == [2, 2, 1]
    assert (found.pairs, found.win_rate) == (5, 0.6)
    wins = [float(row["preference_for_second"]) for row in csv.DictReader((tmp_path / "pairs_judge.csv").open())]
    assert wins == [float(level > 100) for level in levels]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FOLDER"),
        (["a"], "there are no rewards; write --reward NAME"),
        (["a", "--reward", "HPSv3"], "--reward: there is no Reward 'HPSv3'; did you mean HPSv2"),
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
