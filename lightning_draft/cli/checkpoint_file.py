"""Find the checkpoint that a path names, and check that it is valid."""

import zipfile
from pathlib import Path

from lightning_draft.errors import ConfigurationError

_SHARDED = ("meta.pt", ".metadata", "checkpoint", "latest")


def find_checkpoint(path: str) -> Path:
    """Return the checkpoint that `--ckpt_path` names: a file, a sharded folder, or the newest one in a run's folder.

    Raises:
        ConfigurationError: The path is remote, does not exist, or is not a checkpoint.
    """
    if path.partition(":")[0] == "registry":
        raise ConfigurationError(
            f"--ckpt_path={path!r} is not supported; give a file, a run's folder, or `last` for the newest run"
        )
    if path.startswith("file://"):
        raise ConfigurationError(
            f"--ckpt_path={path!r} must be a path and not a URL; write {path.removeprefix('file://')}"
        )
    if "://" in path:
        raise ConfigurationError(
            f"--ckpt_path={path!r} is remote, and loading a checkpoint can run code from it; download a checkpoint "
            "that you trust and give the local file"
        )
    if path == "hpc":
        raise ConfigurationError("--ckpt_path=hpc is not supported; use --resume auto, see docs/cluster.md")
    place = Path(path).expanduser()
    if place.is_dir() and not _is_sharded(place):
        newest = newest_checkpoint(place)
        if newest is None:
            raise ConfigurationError(f"--ckpt_path: the folder {path} has no checkpoint; give a run's folder or a file")
        return check_checkpoint(newest)
    if not place.exists():
        raise ConfigurationError(
            f"--ckpt_path: there is no checkpoint {path}; give a file, a run's folder, or `last` for the newest run"
        )
    return check_checkpoint(place)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest `.ckpt` in a folder or in its `checkpoints`, or `None`; unfinished files do not count."""
    found = (file for place in (folder, folder / "checkpoints") for file in place.glob("*.ckpt"))
    files = [file for file in found if not file.name.startswith(".")]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def check_checkpoint(path: Path) -> Path:
    """Return `path` if it is a complete Lightning checkpoint.

    Raises:
        ConfigurationError: It is not a complete checkpoint.
    """
    if path.is_dir():
        return path
    reason = _fault(path)
    if reason is not None:
        raise ConfigurationError(f"{path} {reason}; give a file such as runs/NAME/checkpoints/last.ckpt")
    return path


def _fault(path: Path) -> str | None:
    try:
        if path.stat().st_size == 0:
            return "is empty: writing it was interrupted"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/data.pkl") for name in names):
                return "is not a checkpoint: it is another kind of zip file"
            if archive.testzip() is not None:  # torch does not compare checksums
                return "is damaged: its checksum differs; copy it again, or use another checkpoint"
    except zipfile.BadZipFile:
        return "is not a checkpoint or is incomplete"
    return None if _has_training_state(path) else "is not a checkpoint of a training run: it contains no training step"


def _has_training_state(path: Path) -> bool:
    """Return whether the file contains a training step; true if it cannot be read without running code."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return True  # contains objects of other classes; the error on loading names the option that allows them
    except RuntimeError:
        return False
    return isinstance(content, dict) and "global_step" in content and "state_dict" in content


def _is_sharded(folder: Path) -> bool:
    return any((folder / name).exists() for name in _SHARDED)
