"""The Python code of the documentation runs, and its commands name shipped configs."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import lightning_draft

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


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}" not in navigation] == []


@pytest.mark.parametrize("module", DOCTESTS)
def test_examples_in_docstrings_give_the_shown_results(module):
    result = doctest.testmod(import_module(module))
    assert result.attempted
    assert not result.failed
