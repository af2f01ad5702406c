"""What is shipped is what is in the tree, and what is optional stays optional."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_draft"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {"lightning_draft.callbacks": "callbacks", "lightning_draft.configs": "configs"}
EXTRAS = ["datasets", "hpsv2", "open_clip", "image_reward", "ImageReward", "torchvision", "deepspeed", "wandb"]


def modules() -> dict[str, Path]:
    """Every module of the package by name; callbacks and configs through their links."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for file in (Path(folder) / name for name in names if name.endswith(".py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def is_core(module: str) -> bool:
    """Everything but the callbacks and the command line, which offers them."""
    return not re.match(r"lightning_draft\.(callbacks|cli|__main__)\b", module)


def test_the_packages_listed_are_those_in_the_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    packages = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert len(listed) == len(set(listed))
    assert set(listed) == packages


def test_the_links_lead_to_the_top_level_folders() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == TOP_LEVEL
    for module, folder in TOP_LEVEL.items():
        link = PACKAGE / module.rpartition(".")[2]
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of the tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("lightning_draft", "callbacks", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, folder], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


def test_the_wheel_holds_every_module(wheel: list[str]) -> None:
    built = {name for name in wheel if name.endswith(".py")}
    assert built == {str(file.relative_to(ROOT)) for file in modules().values()}
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"lightning_draft"}


def test_the_wheel_holds_what_the_modules_read(wheel: list[str]) -> None:
    wanted = {"lightning_draft/py.typed"}
    for folder, pattern in (("configs", "*.yaml"), ("prompts", "*.txt"), ("prompts", "*.csv"), ("assets", "**/*")):
        files = {
            file for file in (PACKAGE / folder).glob(pattern) if file.is_file() and "__pycache__" not in file.parts
        }
        assert any(file.suffix != ".py" for file in files) or folder == "assets", folder
        wanted |= {str(file.relative_to(ROOT)) for file in files}
    assert wanted <= set(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_core_never_imports_callbacks_or_the_command_line() -> None:
    """In its source, at any depth."""
    for name, file in modules().items():
        if not is_core(name):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not [other for other in imported if other.startswith("lightning_draft") and not is_core(other)], name


def test_everything_imports_without_the_extras() -> None:
    """In a fresh interpreter that cannot find them; the core alone draws in neither callbacks nor cli."""
    names = sorted(modules())
    core = [name for name in names if is_core(name)]
    others = [name for name in names if not is_core(name) and not name.endswith("__main__")]
    program = f"""
import importlib, sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {EXTRAS!r}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
for name in {core!r}:
    importlib.import_module(name)
drawn = [name for name in sys.modules if name.startswith(("lightning_draft.callbacks", "lightning_draft.cli"))]
assert not drawn, drawn
for name in {others!r}:
    importlib.import_module(name)
assert not set({EXTRAS!r}) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing() -> None:
    """So that a version or a list of configs is shown at once."""
    program = "import sys; import lightning_draft; assert not {'torch', 'lightning', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_agree() -> None:
    import lightning_draft

    assert PROJECT["project"]["version"] == lightning_draft.__version__


def test_the_optional_packages_are_extras_and_no_dependencies() -> None:
    required = {re.split(r"[\[<>=~ ]", entry)[0].lower() for entry in PROJECT["project"]["dependencies"]}
    assert not required & {name.lower() for name in EXTRAS}
