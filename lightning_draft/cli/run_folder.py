"""The folder that a run writes to: `runs/NAME`, `runs/NAME-2`, ..., created exclusively by one process."""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_draft.cli.checkpoint_file import check_checkpoint, find_checkpoint, newest_checkpoint
from lightning_draft.cli.messages import printable
from lightning_draft.errors import ConfigurationError

ROOT = "runs"
_MAX_BYTES = 200


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the checkpoint that it continues from.

    Args:
        path: The folder.
        checkpoint: The checkpoint to load, or `None`.
        created: Whether this process created the folder for this run.
    """

    path: Path
    checkpoint: Path | None = None
    created: bool = False


def choose(config: Mapping[str, Any], root: Path, configs: Sequence[Path], *, named: bool, creates: bool) -> RunFolder:
    """Return the folder of a run, and the checkpoint that it continues from.

    Args:
        config: The options `name`, `ckpt_path`, `resume` and `checkpoint`.
        root: The folder of all runs.
        configs: The config files; a run that starts from the `config.yaml` of another run resumes in its folder.
        named: Whether the name was given on the command line.
        creates: Whether this process creates the folder of a new run.

    Raises:
        ConfigurationError: The name is not valid, or there is no such checkpoint.
    """
    name, checkpoint = check_name(config["name"]), config["ckpt_path"]
    saved = [path.parent for path in configs if path.name == "config.yaml"][-1:]
    own = None if named or not saved else saved[0]
    elsewhere = _dirpath(config["checkpoint"])
    if config["resume"] == "auto":
        if checkpoint is not None:
            raise ConfigurationError("--resume auto finds the checkpoint itself; leave --ckpt_path out")
        return start_or_resume(own or root / name, elsewhere)
    if checkpoint == "last":
        if own is None and elsewhere is None:
            return newest(root, name)
        return resume(own or (existing(root, name) or [root / name])[-1], elsewhere)
    file = None if checkpoint is None else find_checkpoint(str(checkpoint))
    if not creates:
        return RunFolder(root / name, file)
    return RunFolder(create(root, name).path, file, created=True)


def _dirpath(callback: Any) -> Path | None:
    """Return the folder in the configuration of a callback, if it has one."""
    folder = None if callback is None else callback.get("init_args", {}).get("dirpath")
    return None if folder is None else Path(folder).expanduser()


def default_name(configs: Iterable[Path]) -> str:
    """Return the default name of a run: that of its last config, or of the run folder that contains the config."""
    stems = [path.resolve().parent.name if path.name == "config.yaml" else path.stem for path in configs]
    return stems[-1] if stems else "draft"


def check_name(name: str) -> str:
    """Return the name of a run if it names a folder inside `runs`.

    Raises:
        ConfigurationError: The name is absolute, contains `..`, or has characters that are not allowed in a folder
            name.
    """
    reason = next(filter(None, map(_fault, name.split("/"))), None)
    if reason is not None:
        raise ConfigurationError(f"--name={name!r} {reason}; write a name such as my-run or sweep/1")
    return name


def existing(root: Path, name: str) -> list[Path]:
    """Return the folders `name`, `name-2`, ... in `root`, oldest first."""
    place = root / name
    entries = place.parent.iterdir() if place.parent.is_dir() else ()
    return sorted(
        (path for path in entries if _number(path.name, place.name)), key=lambda p: _number(p.name, place.name)
    )


def create(root: Path, name: str) -> RunFolder:
    """Create the folder of a new run; no other process gets the same folder.

    Raises:
        ConfigurationError: The name is not valid, or the folder cannot be created.
    """
    place = root / check_name(name)
    while True:
        taken = existing(root, name)
        number = _number(taken[-1].name, place.name) + 1 if taken else 1
        folder = place if number == 1 else place.with_name(f"{place.name}-{number}")
        try:
            _make_parents(folder.parent)
            folder.mkdir()
        except FileExistsError as error:
            if not folder.parent.is_dir():
                other = "--name" if root.is_dir() else "folder with --trainer.default_root_dir"
                raise ConfigurationError(f"{folder.parent} is not a folder; choose another {other}") from error
        except FileNotFoundError:
            continue
        else:
            return RunFolder(folder, created=True)


def _make_parents(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{folder} cannot be created ({error.strerror}); choose another folder with --trainer.default_root_dir"
        ) from error


def newest(root: Path, name: str) -> RunFolder:
    """Return the newest run of a name with its newest checkpoint.

    Raises:
        ConfigurationError: There is no run of that name, or the newest has no checkpoint.
    """
    runs = existing(root, check_name(name))
    if not runs:
        raise ConfigurationError(
            f"--ckpt_path last: there is no run {root / name}; leave --ckpt_path out to start one, or give the --name "
            "of a run"
        )
    checkpoint = newest_checkpoint(runs[-1])
    if checkpoint is None:
        others = [run for run in runs[:-1] if newest_checkpoint(run) is not None]
        hint = f"to continue from {others[-1]} write --ckpt_path {others[-1]}" if others else "leave --ckpt_path out"
        which = ", the newest run" if len(runs) > 1 else ""
        raise ConfigurationError(f"--ckpt_path last: there is no checkpoint in {runs[-1]}{which}; {hint}")
    return RunFolder(runs[-1], check_checkpoint(checkpoint))


def resume(folder: Path, checkpoints: Path | None = None) -> RunFolder:
    """Return the run in `folder` with its newest checkpoint.

    Args:
        folder: The run's folder.
        checkpoints: Where its checkpoints are, if elsewhere.

    Raises:
        ConfigurationError: It has no checkpoint.
    """
    checkpoint = newest_checkpoint(folder if checkpoints is None else checkpoints)
    if checkpoint is None:
        raise ConfigurationError(
            f"--ckpt_path last: there is no checkpoint in {checkpoints or folder}; leave --ckpt_path out to start a run"
        )
    return RunFolder(folder, check_checkpoint(checkpoint))


def start_or_resume(folder: Path, checkpoints: Path | None = None) -> RunFolder:
    """Return the run in `folder` with its newest checkpoint, if it has one; create the folder if there is none.

    Raises:
        ConfigurationError: The checkpoint is broken, or the folder cannot be created.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_checkpoint(folder if checkpoints is None else checkpoints)
    return RunFolder(folder, None if checkpoint is None else check_checkpoint(checkpoint), created)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within this context, no other process can train in `folder`, unless the file system has no locks.

    Raises:
        ConfigurationError: Another process trains there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigurationError(
            f"another process is training in {folder}; wait until it ends, or start a new run with another --name"
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def discard(run: RunFolder) -> None:
    """Remove the folder that this process created for a run without a step, unless it contains results."""
    if not run.created or not run.path.is_dir():
        return
    files = list(run.path.iterdir())
    if all(file.name in ("config.yaml", "hparams.yaml") or file.name.startswith("events.out.") for file in files):
        for file in files:
            file.unlink()
        run.path.rmdir()
        if not any(run.path.parent.iterdir()):
            run.path.parent.rmdir()


def adapters(folder: Path) -> Path:
    """Return the LoRA file of a run: the best, or the last if there is no best.

    Raises:
        ConfigurationError: The run has no LoRA file.
    """
    for name in ("best", "last"):
        file = folder / "lora" / f"{name}.safetensors"
        if file.is_file():
            return file
    raise ConfigurationError(
        f"{folder} has no LoRA file (lora/best.safetensors or lora/last.safetensors); give a .safetensors file"
    )


def _fault(part: str) -> str | None:
    """Return why a part of a run's name is not valid, or `None`."""
    if part in ("", ".", "..") or part.startswith("~"):
        return "must be a name inside the folder runs: not absolute, without .. and without empty parts"
    if printable(part) != part or "\n" in part or "\t" in part or "\\" in part or part != part.strip():
        return "contains characters that are not allowed in a folder name"
    if part.startswith("-"):
        return "must not start with a dash"
    return f"is longer than {_MAX_BYTES} bytes" if len(part.encode()) > _MAX_BYTES else None


def _number(folder: str, name: str) -> int:
    """Return the number of a folder among the runs of `name`, from 1; 0 if it is not one of them."""
    match = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", folder)
    return 0 if match is None else int(match[1] or 1)
