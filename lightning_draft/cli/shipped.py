"""Shipped configs: find them by name, list them; without importing anything heavy."""

import difflib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_draft.errors import ConfigurationError

_FLAGS = ("-c", "--config")


def folder() -> Path:
    """Where the shipped configs lie."""
    return Path(str(files("lightning_draft.configs")))


def names() -> list[str]:
    """Names of the shipped configs, `quickstart` first."""
    return sorted((path.stem for path in folder().glob("*.yaml")), key=lambda name: (name != "quickstart", name))


def locate(name: str) -> Path:
    """The file of a config.

    Args:
        name: A shipped name, a YAML file, or a run's folder.

    Raises:
        ConfigurationError: There is no such config.
    """
    if name in names():
        return folder() / f"{name}.yaml"
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigurationError(f"{name} is a folder without a config.yaml; give a YAML file or a run's folder")
    if path.suffix or len(path.parts) > 1:
        raise ConfigurationError(f"there is no config file {name}")
    raise ConfigurationError(
        f"there is no config {name!r}: no file, and not a shipped name{nearest(name, names())}; "
        "see lightning-draft configs list"
    )


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file, interpolations unresolved.

    Raises:
        ConfigurationError: It is not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError(f"{path}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must be a mapping with keys such as model, data and trainer")
    return content


def expand(args: Sequence[str]) -> list[str]:
    """Replace the names after `--config` by files, and check that they can be read.

    Raises:
        ConfigurationError: One of them cannot.
    """
    expanded: list[str] = []
    values = iter(args)
    for arg in values:
        flag, equals, name = arg.partition("=")
        if flag not in _FLAGS:
            expanded.append(arg)
            continue
        name = name if equals else next(values, "")
        if not name:
            raise ConfigurationError(f"{flag} needs a config: {', '.join(names())}; or a YAML file")
        path = locate(name)
        read(path)
        expanded += ["--config", str(path)]
    return expanded


def listing() -> str:
    """One line a config: its name and the comment that it opens with."""
    width = max(map(len, names()), default=0)
    return "\n".join(f"{name:{width}}  {_summary(folder() / f'{name}.yaml')}" for name in names())


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X` for the closest of the known words, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}" if found else ""


def _summary(path: Path) -> str:
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)
