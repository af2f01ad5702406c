"""The distributions contain the tree, and optional packages are optional."""

import ast
import email
import filecmp
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_draft"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {"lightning_draft.callbacks": "callbacks", "lightning_draft.configs": "configs"}
ADDRESS = "https://example.org/team/draft"
EXTRAS = [
    "datasets",
    "hpsv2",
    "open_clip",
    "image_reward",
    "ImageReward",
    "torchvision",
    "deepspeed",
    "pyarrow",
    "torchao",
    "wandb",
]


def modules() -> dict[str, Path]:
    """Every module of the package by name; callbacks and configs through their links."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for file in (Path(folder) / name for name in names if name.endswith(".py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def is_core(module: str) -> bool:
    """Whether a module belongs neither to the callbacks nor to the command line."""
    return not re.match(r"lightning_draft\.(callbacks|cli|__main__)\b", module)


def test_listed_packages_equal_those_in_the_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    packages = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert len(listed) == len(set(listed))
    assert set(listed) == packages


def test_links_point_to_the_top_level_folders() -> None:
    """In a checkout; the sdist contains copies instead."""
    assert PROJECT["tool"]["setuptools"]["package-dir"] == TOP_LEVEL
    for module, folder in TOP_LEVEL.items():
        link = PACKAGE / module.rpartition(".")[2]
        names = [file.name for file in (ROOT / folder).iterdir() if file.is_file()]
        _, different, missing = filecmp.cmpfiles(link, ROOT / folder, names, shallow=False)
        assert not different + missing
        if (ROOT / ".git").exists():
            assert link.is_symlink()
            assert link.readlink() == Path("..") / folder


def build(kind: str, source: Path, folder: Path, **variables: str) -> Path:
    """Build an sdist or a wheel in a source tree with setuptools alone, without a network, and return the file."""
    program = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    command, environment = [sys.executable, "-c", program, folder], os.environ | variables
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(
        "__pycache__", ".venv*", ".git", "runs", ".*_cache", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    with tarfile.open(build("sdist", folder / "source", folder, LIGHTNING_DRAFT_REPOSITORY=ADDRESS)) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = folder.glob("lightning_draft-*/")
    return unpacked


@pytest.fixture(scope="module")
def wheel_file(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the sdist as pip builds it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    """The files in the wheel."""
    return zipfile.ZipFile(wheel_file)


def test_sdist_contains_the_tree(sdist: Path) -> None:
    """All test files too, and the modules and data that they need."""
    folders = ["lightning_draft", "callbacks", "configs", "tests", "docs", "examples", "benchmarks", ".ci", ".github"]
    files = {file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()}
    files |= {file for file in ROOT.iterdir() if file.is_file() and file.name not in (".git", ".gitignore")}
    wanted = {file.relative_to(ROOT) for file in files if "__pycache__" not in file.parts}
    assert {file for file in wanted if not (sdist / file).is_file()} == set()


def test_the_installed_wheel_runs_outside_the_repository(wheel_file: Path, tmp_path: Path) -> None:
    """In a separate environment that uses the requirements of the current one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = (tmp_path / "venv").glob("**/site-packages")
    install = ["-m", "pip", "--python", str(binaries / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, *install, wheel_file], check=True, env=environment)
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    where = run(str(binaries / "python"), "-c", "import lightning_draft; print(lightning_draft.__file__)")
    assert Path(where).is_relative_to(packages)
    version = PROJECT["project"]["version"]
    assert run(str(binaries / "lightning-draft"), "--version") == f"lightning-draft {version}"
    assert "quickstart" in run(str(binaries / "lightning-draft"), "configs", "list")


def test_a_wheel_has_the_addresses_and_absolute_links_of_the_sdist(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert {f"Source, {ADDRESS}", f"Issues, {ADDRESS}/issues"} < set(metadata.get_all("Project-URL"))
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", str(metadata.get_payload()))
    assert len(links) > 30
    for image, link in links:
        assert link.startswith(("https://", "#"))
        if link.startswith(ADDRESS):
            kind, _, path = link.removeprefix(f"{ADDRESS}/").split("/", 2)
            assert kind == ("raw" if image else "blob")
            assert (ROOT / path.partition("#")[0]).exists()


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/team/draft.git", ADDRESS),
        ("https://name:secret@example.org/team/draft", ADDRESS),
        ("git@example.org:team/draft.git", ADDRESS),
        ("ssh://git@example.org/team/draft.git", ADDRESS),
        ("/home/name/draft", None),
    ],
)
def test_the_address_of_the_repository_is_that_of_its_remote(remote: str, address: str | None, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    program = "import setup; print(setup.repository())"
    variables = {key: value for key, value in os.environ.items() if key != "LIGHTNING_DRAFT_REPOSITORY"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=variables)
    assert done.stdout.strip() == str(address)


def test_wheel_contains_every_module(wheel: zipfile.ZipFile) -> None:
    built = {name for name in wheel.namelist() if name.endswith(".py")}
    assert built == {str(file.relative_to(ROOT)) for file in modules().values()}
    assert [name for name in built if wheel.read(name) != (ROOT / name).read_bytes()] == []
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"lightning_draft"}


def test_wheel_contains_the_data_files(wheel: zipfile.ZipFile) -> None:
    wanted = {"lightning_draft/py.typed"}
    for folder, pattern in (("configs", "*.yaml"), ("prompts", "*.txt"), ("assets", "**/*")):
        files = {
            file for file in (PACKAGE / folder).glob(pattern) if file.is_file() and "__pycache__" not in file.parts
        }
        assert any(file.suffix != ".py" for file in files) or folder == "assets", folder
        wanted |= {str(file.relative_to(ROOT)) for file in files}
    assert wanted <= set(wheel.namelist())
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


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


def test_all_modules_import_without_the_extras() -> None:
    """In a new interpreter that cannot find them, a model first; the core imports neither callbacks nor cli."""
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
from lightning_draft import StableDiffusion
for name in {core!r}:
    importlib.import_module(name)
imported = [name for name in sys.modules if name.startswith(("lightning_draft.callbacks", "lightning_draft.cli"))]
assert not imported, imported
for name in {others!r}:
    importlib.import_module(name)
assert not set({EXTRAS!r}) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_module() -> None:
    """So that the version or the list of configs is printed quickly."""
    program = "import sys; import lightning_draft; assert not {'torch', 'lightning', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_numbers_agree() -> None:
    import lightning_draft

    assert PROJECT["project"]["version"] == lightning_draft.__version__


def requirements() -> dict[str, str]:
    """Lowest release of each requirement, by name."""
    entries = (
        re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)(?:,<\d+)?", entry) for entry in PROJECT["project"]["dependencies"]
    )
    return {entry[1].lower(): entry[2] for entry in entries if entry}


def test_every_requirement_has_a_lowest_release_and_the_oldest_constraints_pin_it() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(requirements()) == len(PROJECT["project"]["dependencies"])
    padded = {name: (release + ".0.0").split(".")[:3] for name, release in requirements().items()}
    assert {name: release.split(".") for name, release in pins.items()} == padded


def test_requirements_equal_the_imported_packages() -> None:
    """TensorBoard is imported by Lightning's logger."""
    imported: set[str] = set()
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.partition(".")[0] for name in names}
    distributions = packages_distributions()
    others = imported - sys.stdlib_module_names - {"lightning_draft", *EXTRAS}
    assert {distributions[name][0].lower() for name in others} | {"tensorboard"} == set(requirements())


def test_optional_packages_are_extras_only() -> None:
    assert not set(requirements()) & {name.lower() for name in EXTRAS}
