"""The README's commands on the shipped model run as they are written."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lightning-draft (fit --config (?:quickstart|guard|loop)\b.*)$", README, re.MULTILINE)
SHORT = {
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.limit_val_batches": 1,
    "data.batch_size": 1,
    "data.val_batch_size": 2,
    "samples": "null",
}


def test_they_are_found() -> None:
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(line: str, command: Callable) -> None:
    (reward,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Redness" in block]
    Path("my_rewards.py").write_text(reward)
    options = dict(SHORT)
    if "loop" in line:
        options |= {"data.batch_size": 2}
    result = command(*line.split(), *(word for key, value in options.items() for word in (f"--{key}", value)))
    assert result.status == 0, result.err
    assert list(Path("runs").glob("*/lora/last.safetensors"))
