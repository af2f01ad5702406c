"""The table of truncations: what it counts, and that it picks up where it stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

from examples import truncation_table
from lightning_draft.truncation import Full, LastK, LowVariance, Truncation

STEPS, BATCH = 3, 2


@pytest.fixture
def command(tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    options = {
        "out": tmp_path,
        "model": tiny_sd,
        "clip": tiny_clip,
        "budget": 1,
        "sampling-steps": STEPS,
        "batch-size": BATCH,
        "every": 60,
    }
    words = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["truncation_table", *words])
    return tmp_path


@pytest.mark.parametrize(
    ("truncation", "passes"),
    [
        (LastK(1), STEPS + 1),
        (LastK(2), 1 + 2 * 3),
        (Full(), STEPS * 3),
        (LowVariance(2), STEPS + 1 + 2 * 2),
    ],
)
def test_passes_of_one_step(
    truncation: Truncation, passes: int, command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor: a forward a step, a forward again where it is recomputed, a backward."""
    monkeypatch.setattr(truncation_table, "METHODS", {"one": lambda: truncation})
    truncation_table.main()
    result = json.loads((command / "truncations.json").read_text())["one"]
    assert result["steps"] == 1
    assert result["cost"] == passes * BATCH


def test_an_interrupted_table_goes_on(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"first": lambda: LastK(1), "second": lambda: LastK(1)}
    monkeypatch.setattr(truncation_table, "METHODS", methods)
    kept = {"steps": 7, "cost": 9, "seconds": 1.0, "curve": [[9, 0.5]]}
    scores = {"reward": -1.0, "retrieval": 0.25}
    (command / "truncations.json").write_text(json.dumps({"first": {**kept, "before": scores, "after": scores}}))
    truncation_table.main()
    lines = (command / "truncations.md").read_text().splitlines()
    assert lines[2].startswith("| first | 7 | 9 |")
    assert lines[3].startswith("| second | 1 |")
    assert (command / "truncations.png").stat().st_size > 0


def test_evaluation_repeats(tiny_sd: Path, tiny_clip: Path) -> None:
    module = truncation_table.build(LastK(1), str(tiny_sd), str(tiny_clip), STEPS, 1e-3, seed=0)
    prompts = ["a cat", "a red bed"]
    first = truncation_table.evaluate(module, prompts)
    torch.randn(3)
    assert truncation_table.evaluate(module, prompts) == first
