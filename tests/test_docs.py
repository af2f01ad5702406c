"""The Python code of the documentation runs, and its commands name shipped configs."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import lightning_draft
from lightning_draft.kl_gate import KLGate
from lightning_draft.methods.anchor import Anchor
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.rewards import Brightness, WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel
from lightning_draft.trust_region import FlowDPPO
from lightning_draft.value_baseline import ValueBaseline
from lightning_draft.windows import RandomWindow
from tests import tiny_forward_process, tiny_policy_gradients
from tests.tiny_runs import data

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "rewards.md")
PACKAGE = Path(lightning_draft.__file__).parent
DOCTESTS = [
    ".".join(("lightning_draft", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")])
    if ">>> " in path.read_text()
]
CONFIGS = {path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml")}


def python_blocks(page: Path) -> list[str]:
    """Code blocks that are marked as runnable Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_python_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "errors"], ids=lambda page: page.stem)
def test_commands_on_the_page_name_shipped_configs(page):
    named = set(re.findall(r"--config ([a-z0-9_]+)(?=\s|$|`)", page.read_text(encoding="utf-8")))
    assert named <= CONFIGS


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_code_block_names_one_language_and_nothing_else(page: Path) -> None:
    """The site renders a block with other words, such as `python notest`, as text. Python that is not run is `py`."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert [fence for fence in fences[::2] if not re.fullmatch(r"[a-z]+", fence)] == []
    assert set(fences[1::2]) <= {""}


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}" not in navigation] == []


def module_of(page: str) -> RewardModule:
    """Build a module of the page's method with the options that add metrics."""
    reward = WeightedSum({"bright": WeightedReward(Brightness(), 1.0), "dark": WeightedReward(Brightness(), 1.0)})
    gated: dict[str, object] = {"kl_weight": 0.1, "kl_gate": KLGate(), "eval_rewards": {"even": Brightness()}}
    if page == "direct_gradients":
        return DraftModule(LinearModel(), reward, DDIM(3), kl_weight=0.1, anchor=Anchor())
    if page == "gradient_matching":
        return GradientMatchingModule(LinearModel(), reward, DDIM(3, eta=1.0))
    if page == "forward_process":
        return tiny_forward_process.linear(reward=reward, **gated)
    options: dict[str, object] = {"objective": FlowDPPO(), "window": RandomWindow(2), **gated}
    options["value_baseline"] = ValueBaseline()
    return tiny_policy_gradients.linear(reward=reward, **options)


@pytest.mark.parametrize("page", ["direct_gradients", "gradient_matching", "forward_process", "policy_gradients"])
def test_every_logged_metric_of_a_method_is_on_its_page(page: str, tmp_path: Path) -> None:
    trainer = tiny_policy_gradients.trainer_of(tmp_path, max_steps=1)
    trainer.fit(module_of(page), data())
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8").replace("<name>", "bright")
    tags = [tag for tag in trainer.callback_metrics if tag.startswith("train/") and tag != "train/reward/dark"]
    assert len(tags) >= 5
    assert [tag for tag in tags if f"`{tag}`" not in text] == []


@pytest.mark.parametrize("module", DOCTESTS)
def test_examples_in_docstrings_give_the_shown_results(module):
    result = doctest.testmod(import_module(module))
    assert result.attempted
    assert not result.failed
