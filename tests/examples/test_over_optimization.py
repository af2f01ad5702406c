"""The example of over-optimization: both runs are equal until the guard acts, and the table describes their images."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import over_optimization
from lightning_draft.rewards import Reward


@pytest.fixture
def finished(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run a small version; return the guards by action, and the output folder."""
    options = {"out": tmp_path, "model": tiny_sd, "prompts": "animals", "val-prompts": "animals", "steps": 2}
    options |= {"sampling-steps": 3, "batch-size": 1, "guarded": 2, "measured": 2, "shown": 2, "every": 1, "lr": 0.05}
    words = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["over_optimization", *words])
    guards = {}
    run = over_optimization.run

    def noted(arguments, action):
        module, guards[action] = run(arguments, action)
        return module, guards[action]

    monkeypatch.setattr(over_optimization, "run", noted)
    over_optimization.main()
    return {**guards, "out": tmp_path}


@pytest.mark.filterwarnings("ignore:over-optimized")
def test_example_writes_table_and_figure(finished: dict) -> None:
    watcher, guard, out = finished["warn"], finished["stop"], finished["out"]
    assert list(watcher.history) == [0, 1, 2]
    assert all(watcher.history[step] == evaluation for step, evaluation in guard.history.items())
    lines = (out / "over_optimization.md").read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines[2:]]
    kept = [f"| saved by the guard, step {guard.best_step}"] if guard.best_step else []
    assert names == ["| base", *kept, "| without the guard, step 2"]
    if kept and guard.best_step == watcher.best_step:
        first, second = load_file(guard.best_path), load_file(watcher.best_path)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (out / "over_optimization.png").stat().st_size > 10_000


def test_the_table_has_means_and_standard_errors() -> None:
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])

    class Mean(Reward):
        def forward(self, images, prompts):
            return images.mean((1, 2, 3))

    lines = over_optimization.table({"base": images}, ["a", "b"], {"mean": Mean()}).splitlines()
    assert lines == ["| adapters | mean |", "|---|---|", "| base | 0.50 ± 0.50 |"]
