"""Find and read configs by name, without importing heavy packages."""

import difflib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_draft.cli.callback_options import CALLBACK_OPTIONS
from lightning_draft.errors import ConfigurationError

_FLAGS = ("-c", "--config")
_OPTIONS = (
    *("config", "name", "resume", "ckpt_path", "weights_only", "seed_everything", "print_config", "help", "help_all"),
    *("model", "data", "trainer"),
    *(option.key for option in CALLBACK_OPTIONS),
)
_SIMILARITY = 0.75


def folder() -> Path:
    """Return the folder of the shipped configs."""
    return Path(str(files("lightning_draft.configs")))


def names() -> list[str]:
    """Return the names of the shipped configs, `quickstart` first."""
    return sorted((path.stem for path in folder().glob("*.yaml")), key=lambda name: (name != "quickstart", name))


def locate(name: str) -> Path:
    """Return the file of a config.

    Args:
        name: A shipped name, a YAML file, or a run's folder.

    Raises:
        ConfigurationError: There is no such config.
    """
    if name in names():
        return folder() / f"{name}.yaml"
    path = Path(name).expanduser()
    try:
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        if path.is_file():
            return path
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--config {name!r} is not a config: {error}") from error
    if path.is_dir():
        raise ConfigurationError(f"{name} is a folder without a config.yaml; give a YAML file or a run's folder")
    if path.suffix or len(path.parts) > 1:
        raise ConfigurationError(f"there is no config file {name}; give a YAML file, a run's folder or a shipped name")
    raise ConfigurationError(
        f"there is no config {name!r}: it is neither a file nor a shipped name{nearest(name, names())}; "
        "see lightning-draft configs list"
    )


def read(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file, with interpolations unresolved.

    Raises:
        ConfigurationError: It is not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise yaml_error(path, error) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must be a mapping with keys such as model, data and trainer")
    for key in content:
        if not isinstance(key, str):
            raise ConfigurationError(
                f"{path} has the key {key!r}; its keys must be strings such as model, data and trainer"
            )
    return content


def yaml_error(path: Any, error: Any) -> ConfigurationError:
    """Return the error of a YAML file with the line and the reason; the YAML parser's own message has several lines."""
    line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return ConfigurationError(f"{path}{line} is not YAML: {str(error.problem).rstrip('.')}")


def expand(command: str, args: Sequence[str]) -> list[str]:
    """Replace the names after `--config` by files, after checking the files and the names of the options.

    Args:
        command: The command, for messages.
        args: The arguments after the command.

    Raises:
        ConfigurationError: A config cannot be read, or an option is misspelled.
    """
    expanded: list[str] = []
    values = iter(args)
    for arg in values:
        flag, equals, name = arg.partition("=")
        if flag not in _FLAGS:
            _check_spelling(command, flag, args)
            expanded.append(arg)
            continue
        name = name if equals else next(values, "")
        if not name:
            raise ConfigurationError(f"{flag} needs a config: one of {', '.join(names())}, or a YAML file")
        path = locate(name)
        read(path)
        expanded += ["--config", str(path)]
    return expanded


def _check_spelling(command: str, argument: str, args: Sequence[str]) -> None:
    """Find a misspelled option, or a config without `--config`, before heavy packages are imported.

    Raises:
        ConfigurationError: There is one; the message has the correct spelling.
    """
    if argument is args[0] and not argument.startswith("-"):
        config = argument if argument in names() or Path(argument).exists() else "NAME"
        raise ConfigurationError(f"{argument!r} is not an option; write lightning-draft {command} --config {config}")
    name = argument.removeprefix("--").partition(".")[0].rstrip("+")
    if not argument.startswith("--") or name in _OPTIONS:
        return
    similar = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=_SIMILARITY)
    if similar:
        rest = argument.removeprefix(f"--{name}")
        raise ConfigurationError(f"there is no option {argument}; did you mean --{similar[0]}{rest}")


def listing() -> str:
    """Return one line for each config: its name and the comment at its top."""
    width = max(map(len, names()), default=0)
    return "\n".join(f"{name:{width}}  {_summary(folder() / f'{name}.yaml')}" for name in names())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X` for the most similar of the known words, or an empty text."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}" if found else ""


def _summary(path: Path) -> str:
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)
