"""docs/rewards.md names every reward, and its examples can be run."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_draft.rewards as rewards
from benchmarks import reward_cost
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import Reward

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
CLASSES = {name: kind for name in rewards.__all__ if inspect.isclass(kind := getattr(rewards, name))}
SNIPPETS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_table_lists_every_reward() -> None:
    table = PAGE.split("## Available rewards")[1].split("## Cost")[0]
    for name, kind in CLASSES.items():
        if issubclass(kind, Reward) and not inspect.isabstract(kind) and not issubclass(kind, rewards.WeightedSum):
            row = next(
                line for line in table.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]
            )
            assert ("(black box)" in row) is not kind.differentiable, name


def test_the_cost_table_lists_every_measured_reward() -> None:
    table = PAGE.split("## Cost")[1].split("## Getting the weights")[0]
    measured = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")}
    assert measured >= {case.reward for case in reward_cost.cases("http://127.0.0.1:1")}


def test_names_in_the_page_exist() -> None:
    for module in re.findall(r"python -m ([\w.]+)", PAGE):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in re.findall(r"`((?:examples|lightning_draft)/[\w/.]+)`", PAGE):
        assert (ROOT / path).is_file(), path
    import lightning_draft.callbacks as callbacks

    assert {"OverOptimizationGuard", "RewardConflict"} <= set(vars(callbacks))


def test_arguments_in_the_page_exist() -> None:
    table = PAGE.split("**Offline use.**")[1].split("`HF_HUB_OFFLINE=1`")[0]
    for line in table.splitlines():
        names, arguments = (re.findall(r"`(\w+)`", cell) for cell in (line.split("|") + ["", ""])[1:3])
        for name in set(names) & CLASSES.keys():
            assert set(arguments) <= set(inspect.signature(CLASSES[name]).parameters), line
    for line in PAGE.split("## Metadata of prompts")[1].split("```json")[0].splitlines():
        names, arguments = (re.findall(r"`(\w+)`", cell) for cell in (line.split("|") + ["", ""])[1:3])
        for name in set(names) & CLASSES.keys():
            assert set(arguments) <= {*inspect.signature(CLASSES[name]).parameters}, line


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_configs_in_the_page_can_be_parsed(snippet: str) -> None:
    content: dict[str, Any] = yaml.safe_load(snippet)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    parser.add_argument("--eval_rewards", type=dict[str, Reward])
    parsed = parser.parse_object(content)
    assert parsed.reward.class_path.rpartition(".")[2] == content["reward"]["class_path"]


def test_prompts_in_the_page_are_read(tmp_path: Path) -> None:
    (line,) = re.findall(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    (prompt,) = read_prompts(str(tmp_path / "prompts.jsonl"))
    assert prompt == json.loads(line)["prompt"]
    assert prompt.metadata == {"object": "cat", "count": 3}
