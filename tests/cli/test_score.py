"""The command `score`."""

import csv
import json
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from lightning_draft.__main__ import main
from lightning_draft.rewards import Reward
from tests.rewards.chat_server import ChatServer, gray
from tests.test_scoring import folder


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
