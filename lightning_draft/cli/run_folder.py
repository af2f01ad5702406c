"""Where runs lie: `runs/NAME`, `runs/NAME-2`, ... and which of their checkpoints is the last."""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lightning_draft.errors import ConfigurationError

ROOT = "runs"


def default_name(configs: Iterable[Path]) -> str:
    """The name of a run that was given none: that of its last config, or of the folder of a saved one."""
    stems = [path.parent.name if path.name == "config.yaml" else path.stem for path in configs]
    return stems[-1] if stems else "draft"


def existing(root: Path, name: str) -> list[Path]:
    """The folders `name`, `name-2`, ... in `root`, in that order; a name may lie in folders of its own."""
    place = root / name
    pattern = re.compile(re.escape(place.name) + r"(?:-(\d+))?")
    there = place.parent.iterdir() if place.parent.is_dir() else ()
    found = [(match, path) for path in there if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1] or 1))]


def fresh(root: Path, name: str) -> Path:
    """A folder that no run has used: `root/name`, or with the next free number."""
    taken = [path for path in existing(root, name) if path.is_dir() and any(path.iterdir())]
    if not taken:
        return root / name
    number = re.fullmatch(re.escape((root / name).name) + r"(?:-(\d+))?", taken[-1].name)
    assert number is not None
    return root / f"{name}-{int(number[1] or 1) + 1}"


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused before its first step, unless there are results in it."""
    if not folder.is_dir():
        return
    files = list(folder.iterdir())
    if all(file.name in ("config.yaml", "hparams.yaml") or file.name.startswith("events.out.") for file in files):
        for file in files:
            file.unlink()
        folder.rmdir()


def checkpoint(path: Path) -> Path:
    """The checkpoint that is asked for: a file, or the newest one in a run's folder.

    Raises:
        ConfigurationError: There is none, or the file is something else.
    """
    if (path / "checkpoints").is_dir():
        return last_checkpoint([path])
    if not path.exists():
        raise ConfigurationError(f"there is no checkpoint {path}; give its file, or `last` for this run's own")
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ConfigurationError(f"{path} is not a checkpoint; give a file such as runs/NAME/checkpoints/last.ckpt")
    return path


def last_checkpoint(folders: Iterable[Path]) -> Path:
    """The newest checkpoint in the folders or in the `checkpoints` folders inside them.

    Raises:
        ConfigurationError: There is none.
    """
    folders = list(folders)
    files = [file for folder in folders for place in (folder, folder / "checkpoints") for file in place.glob("*.ckpt")]
    if not files:
        places = ", ".join(map(str, folders)) or "runs"
        raise ConfigurationError(
            f"ckpt_path=last, but there is no checkpoint in {places}; start the run without --ckpt_path, or give the "
            "checkpoint's file, or the run's --name"
        )
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def adapters(folder: Path) -> Path:
    """The best adapters of a run, or its last ones.

    Raises:
        ConfigurationError: It has none.
    """
    for name in ("best", "last"):
        file = folder / "lora" / f"{name}.safetensors"
        if file.is_file():
            return file
    raise ConfigurationError(f"{folder} holds no adapters (lora/best.safetensors, lora/last.safetensors)")
