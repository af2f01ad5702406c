"""The command `guide`."""

import csv
import json
from collections.abc import Callable
from operator import ge, gt
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_draft.image_generation import generate
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM

METHODS = ["best_of_n:2", "gradient:40", "norm_matched:0.2", "reno:1", "dno:1"]
ROWS = ["base", "best_of_n 2", "gradient 40", "norm_matched 0.2", "reno 1", "dno 1"]
FORWARDS = [1, 2, 1, 1, 3, 3]  # of sampling; reno:1 samples twice, once with steps that are recomputed
BACKWARDS = {
    "tiny_sd": [0, 0, 1, 0, 1, 1],
    "tiny_sd3": [0, 0, 2 / 3, 0, 1, 1],  # a flow's first step is not guided
    "tiny_pixels": [0, 0, 1, 0, 1, 1],
}

INCREASING = ("gradient 40", "norm_matched 0.2", "reno 1")


def tables(stem: str) -> tuple[dict[str, Any], dict[tuple[str, str, str], dict[str, float]]]:
    """Return the summary, and the scores by method, prompt and seed."""
    summary = json.loads(Path(f"{stem}.json").read_text())
    with Path(f"{stem}.csv").open(newline="") as file:
        rows = {
            (row.pop("method"), row.pop("prompt"), row.pop("seed")): {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        }
    return summary, rows


@pytest.mark.parametrize("family", BACKWARDS)
def test_every_method_runs_and_its_cost_and_scores_are_written(
    command: Callable, family: str, request: pytest.FixtureRequest
) -> None:
    bright = "{class_path: Brightness, init_args: {target: 0.9}}"
    Path("rewards.yaml").write_text(f"Brightness: {bright}\nSymmetry: {{class_path: Symmetry}}\n")
    args = ["--model", request.getfixturevalue(family), "--rewards", "rewards.yaml", "--prompt", "a cat"]
    result = command("guide", *args, "--steps", 3, "--seed", 1, 2, "--method", *METHODS, "-o", "a.png")
    assert result.status == 0, result.err
    assert "reward: Brightness; evaluation: Symmetry" in result.out
    summary, scores = tables("a")
    rows = summary["methods"]
    assert [row["method"] for row in rows] == ROWS
    once = rows[0]["forwards_per_image"]
    assert once in (3, 6)  # with classifier-free guidance
    assert [row["forwards_per_image"] for row in rows] == [once * factor for factor in FORWARDS]
    assert [row["backwards_per_image"] for row in rows] == [once * factor for factor in BACKWARDS[family]]
    for row in rows:
        values = [scores[row["method"], "a cat", seed] for seed in ("1", "2")]
        bright = [each["Brightness"] for each in values]
        assert row["mean"]["Brightness"] == pytest.approx(sum(bright) / 2, rel=1e-4)
        assert row["gain"]["Brightness"] == pytest.approx(sum(bright) / 2 - rows[0]["mean"]["Brightness"], abs=1e-5)
    bright = {label: [scores[label, "a cat", seed]["Brightness"] for seed in "12"] for label in ROWS}
    for label in ROWS:
        assert all(map(gt if label in INCREASING else ge, bright[label], bright["base"])), label


def test_scores_of_base_and_tuned_images_are_those_of_generate(command: Callable, trained: Path) -> None:
    result = command("guide", "runs/small", "--method", "best_of_n:1", "-o", "guide.png")
    assert result.status == 0, result.err
    summary, _ = tables("guide")
    base, best, tuned = summary["methods"]
    assert base["mean"] == best["mean"] != tuned["mean"]
    with Path("guide.csv").open(newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file) if row["method"] == "base"]
    model = StableDiffusion(json.loads(Path("guide.json").read_text())["model"], guidance=Guidance(2.0), lora=None)
    model.load_lora("runs/small/lora/best.safetensors")
    for scale, row in ((0.0, base), (1.0, tuned)):
        images = generate(model, DDIM(3), prompts, 0, scale).images.clamp(0, 1)
        assert Brightness(0.9)(images, prompts).mean().item() == pytest.approx(row["mean"]["reward"], abs=1e-5)


def test_black_box_reward_is_used_by_best_of_n_only(command: Callable, tiny_sd: Path) -> None:
    args = ["--model", tiny_sd, "--prompt", "red", "--steps", 2, "--reward", "JPEGSize"]
    for output in ("guide.png", "again.png"):
        result = command("guide", *args, "-o", output)
        assert result.status == 0, result.err
    assert [row["method"] for row in tables("guide")[0]["methods"]] == ["base", "best_of_n 8"]
    assert Path("guide.png").read_bytes() == Path("again.png").read_bytes()
    assert tables("guide")[0]["methods"][1]["standard_error_of_gain"] == {"JPEGSize": None}  # of one image
    with Image.open("guide.png") as grid:
        assert grid.width > 2 * 192
    result = command("guide", *args, "--method", "reno")
    assert result.status == 2
    assert "--method reno needs the gradient of the reward, and JPEGSize is not differentiable" in result.err
    assert "best_of_n" in result.err


def test_standardized_rewards_have_the_statistics_of_the_base_images(command: Callable, tiny_sd: Path) -> None:
    Path("sum.yaml").write_text(
        "sum: {class_path: ZScoreSum, init_args: {rewards: {light: {reward: {class_path: Brightness}}}}}\n"
    )
    args = ["--model", tiny_sd, "--prompt", "red", "a cat", "--steps", 2, "--rewards", "sum.yaml"]
    result = command("guide", *args, "--method", "norm_matched")
    assert result.status == 0, result.err
    base = [row["sum"] for (method, *_), row in tables("guide")[1].items() if method == "base"]
    assert base == pytest.approx([1.0, -1.0], rel=1e-3) or base == pytest.approx([-1.0, 1.0], rel=1e-3)


def test_reward_without_a_gradient_is_an_error_before_the_methods_run(command: Callable, tiny_sd: Path) -> None:
    Path("mine.py").write_text(
        "from lightning_draft.rewards import Reward\n"
        "class Rounded(Reward):\n"
        "    def forward(self, images, prompts):\n"
        "        return images.round().mean((1, 2, 3))\n"
    )
    args = ["--model", tiny_sd, "--prompt", "red", "--steps", 2, "--reward", "mine.Rounded"]
    result = command("guide", *args, "--method", "gradient")
    assert result.status == 2
    assert "the gradient of the reward Rounded with respect to the images is exactly zero" in result.err
    assert command("guide", *args, "--method", "best_of_n:2").status == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "red"], "there is no reward; write --reward NAME"),
        (["--reward", "Brightness"], "there are no prompts"),
        (["--reward", "Brightness", "--prompt", "red", "--method", "best_of_m"], "did you mean best_of_n"),
        (["--scale", "2"], "there is no option --scale; see lightning-draft guide --help"),
    ],
)
def test_invalid_arguments_give_one_message(command: Callable, tiny_sd: Path, args: list[str], message: str) -> None:
    result = command("guide", "--model", tiny_sd, *args)
    assert result.status == 2
    assert message in result.err
    assert not list(Path().glob("guide.*"))


def test_rewards_file_cannot_replace_the_trained_reward(command: Callable) -> None:
    Path("own.yaml").write_text("reward: {class_path: Brightness}")
    result = command("guide", "--config", "quickstart", "--rewards", "own.yaml")
    assert (result.status, "the name 'reward' is that of the trained reward" in result.err) == (2, True)
