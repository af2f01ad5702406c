"""The example of over-optimization: its two runs are one until the guard acts, and the table is what it saw."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import over_optimization


@pytest.fixture
def finished(tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run it small; the guards by action, and where it wrote."""
    options = {"out": tmp_path, "model": tiny_sd, "clip": tiny_clip, "prompts": "animals", "steps": 2, "every": 1}
    options |= {"sampling-steps": 3, "batch-size": 1, "pictures": 2, "lr": 0.05}
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
def test_what_it_writes(finished: dict) -> None:
    watcher, guard, out = finished["warn"], finished["stop"], finished["out"]
    assert list(watcher.history) == [0, 1, 2]
    assert all(watcher.history[step] == look for step, look in guard.history.items())
    lines = (out / "over_optimization.md").read_text().splitlines()
    base = watcher.history[0]
    assert lines[2].startswith(f"| base | {base.reward:.3f} | {base.eval_rewards['recognized']:.2f} |")
    assert lines[-1].startswith(f"| without the guard, step 2 | {watcher.history[2].reward:.3f} |")
    assert lines[3].startswith(f"| kept by the guard, step {guard.best_step} |")
    kept = load_file(guard.best_path)
    assert any(value.any() for name, value in kept.items() if "lora_B" in name)
    if guard.best_step == watcher.best_step:
        assert all(torch.equal(value, load_file(watcher.best_path)[name]) for name, value in kept.items())
    assert (out / "over_optimization.png").stat().st_size > 10_000
