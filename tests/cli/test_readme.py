"""The commands of README and documentation for the shipped model run as written."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
PATTERN = re.compile(r"^lightning-draft (fit --config (?:quickstart|guard|loop|draft_k)\b[^#\n]*)", re.MULTILINE)
COMMANDS = sorted({line.strip() for page in PAGES for line in PATTERN.findall(page)})
SKIPPED = ("--ckpt_path last", "mine.yaml", "my_rewards.score", "my_networks.Scorer")
"""Parts of commands that need an earlier run or a file that the reader writes."""
SHORT = {
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.limit_val_batches": 1,
    "data.batch_size": 1,
    "data.val_batch_size": 2,
    "samples": "null",
}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
REWARD = (ROOT / "docs" / "your_reward.md").read_text(encoding="utf-8")


def test_documented_commands_are_found() -> None:
    assert len(COMMANDS) >= 6


def test_python_code_of_the_readme_trains_as_quickstart(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in PYTHON:
        block = block.replace("max_steps=28", "max_steps=2, limit_val_batches=0").replace(
            "batch_size=8", "batch_size=2"
        )
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    options = {**SHORT, "trainer.max_steps": 2, "trainer.limit_val_batches": 0, "trainer.val_check_interval": "null"}
    options["data.batch_size"] = 2
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    result = command("fit", "--config", "quickstart", *words)
    assert result.status == 0, result.err
    python, run = load_file("lora.safetensors"), load_file("runs/quickstart/lora/last.safetensors")
    assert python.keys() == run.keys()
    assert all(python[name].equal(run[name]) for name in run)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not any(word in line for word in SKIPPED)])
def test_documented_command_runs(line: str, command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # of another test
    (reward,) = [block for block in re.findall(r"```python\n(.*?)```", REWARD, re.DOTALL) if "class Redness" in block]
    Path("my_rewards.py").write_text(reward)
    options = dict(SHORT)
    if "loop" in line:
        options |= {"data.batch_size": 2}
    result = command(*line.split(), *(word for key, value in options.items() for word in (f"--{key}", value)))
    assert result.status == 0, result.err
    assert list(Path("runs").glob("*/lora/last.safetensors"))
