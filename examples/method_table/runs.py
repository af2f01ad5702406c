"""Finished runs in one text file, so that an interrupted table continues where it stopped."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = dict[str, Any]
ROWS = ("evaluations", "curve")
"""Fields that are lists of rows with the same keys; the file stores each as one list per key."""


class RunFile:
    """Read and extend a file of runs: one JSON object a line, in sorted order.

    Several processes may add runs to the same file. Numbers in rows are stored with nine significant digits, which is
    exact in single precision.

    Args:
        file: Path of the file; it is created by the first run added.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def all(self) -> list[Run]:
        """Return every run, in the order of the file."""
        return [_from_line(line) for line in self._lines()]

    def find(self, **identity: Any) -> Run | None:
        """Return the run whose fields have the given values, or None."""
        runs = (run for run in self.all() if all(run.get(key) == value for key, value in identity.items()))
        return next(runs, None)

    def add(self, run: Run) -> Run:
        """Write a run to the file, and return it as it will be read from there."""
        line = _to_line(run)
        with _locked(self.file.parent):
            lines = sorted([*self._lines(), line])
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(f"{each}\n" for each in lines))
            partial.replace(self.file)
        return _from_line(line)

    def _lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _to_line(run: Run) -> str:
    columns = {key: _columns(run[key]) for key in ROWS if key in run}
    return json.dumps({**run, **columns}, separators=(",", ":"))


def _from_line(line: str) -> Run:
    run = json.loads(line)
    return {**run, **{key: _rows(run[key]) for key in ROWS if key in run}}


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [_rounded(row[key]) for row in rows] for key in rows[0]}


def _rows(columns: dict[str, list[float]]) -> list[dict[str, float]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _rounded(value: float) -> float:
    return float(f"{value:.9g}") if isinstance(value, float) else value
