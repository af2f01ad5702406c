"""Compare everything in two run folders: weights, checkpoints, images, settings, and logged values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

_EVENTS = "events.out.tfevents"
_TIMES = ("seconds",)  # differ between any two runs


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return the differences between a run and its reference, which must be bitwise equal.

    Args:
        ours: The folder of the run to check.
        theirs: The folder of the reference.
    """
    our_files, their_files = _files(ours), _files(theirs)
    found = [f"{name} is missing" for name in sorted(their_files - our_files)]
    found += [f"{name} should not be there" for name in sorted(our_files - their_files)]
    for name in sorted(our_files & their_files):
        found += [f"{name}{where}" for where in _unequal(_content(ours / name), _content(theirs / name))]
    return found + [f"logged {key}" for key in _unequal(logged(ours), logged(theirs))]


def logged(folder: Path) -> dict[str, Any]:
    """Return the logged scalars and images by name and step; different values of repeated steps are all returned."""
    values: dict[str, set[Any]] = {}
    for file in sorted(folder.glob(f"{_EVENTS}*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not any(part in value.tag for part in _TIMES):
                    values.setdefault(f"{value.tag}@{event.step}", set()).add(str(make_ndarray(value.tensor).tolist()))
    return dict(values)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and _EVENTS not in path.name}


def _content(path: Path) -> Any:
    """Return the content of a file; the order of metadata in a safetensors file is arbitrary."""
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _unequal(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Yield the differences of two nested containers of tensors."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*ours, *theirs}, key=str):
            if not any(part in str(key) for part in _TIMES):
                missing = object()
                yield from _unequal(ours.get(key, missing), theirs.get(key, missing), f"{where}[{key}]")
    elif isinstance(theirs, (list, tuple)) and type(ours) is type(theirs) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _unequal(one, other, f"{where}[{number}]")
    elif isinstance(theirs, Tensor) or isinstance(ours, Tensor):
        if not (isinstance(theirs, Tensor) and isinstance(ours, Tensor) and torch.equal(ours, theirs)):
            yield where
    elif ours != theirs:
        yield f"{where} ({str(ours)[:60]} instead of {str(theirs)[:60]})"
