"""Scoring folders of images: prompts, tables, resumption, contact sheets, and comparisons against closed forms."""

import csv
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from lightning_draft.score_report import contact_sheet
from lightning_draft.score_table import write_parquet
from lightning_draft.scoring import score_folder
from tests.rewards.chat_server import gray


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


def test_a_contact_sheet_is_sorted_from_best_to_worst(tmp_path: Path) -> None:
    folder(tmp_path, {f"cat_{level}.png": level for level in (200, 10, 100, 150)}, (16, 16))
    rows = score_folder(tmp_path, {"mean": Mean()})
    sheet = np.asarray(contact_sheet(tmp_path, rows, "mean", side=16, per_row=4))
    assert [int(sheet[8, 20 * i + 8, 0]) for i in range(4)] == [200, 150, 100, 10]
    few = np.asarray(contact_sheet(tmp_path, rows, "mean", most=2, side=16, per_row=2))
    assert [int(few[8, 20 * i + 8, 0]) for i in range(2)] == [200, 10]


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


def test_rewards_compute_without_gradients_and_in_eval_mode(tmp_path: Path) -> None:
    folder(tmp_path, {"cat.png": 100})
    enabled: list[bool] = []

    def judge(images: object, prompts: list[str]) -> list[float]:
        enabled.append(torch.is_grad_enabled())
        return [1.0]

    score_folder(tmp_path, {"judge": PythonFunction(judge)})
    assert enabled == [False]
