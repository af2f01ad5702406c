"""The table `scores.csv` of a folder of images, which an interrupted scoring continues."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path, writing
from lightning_draft.redaction import redact
from lightning_draft.rewards.base import Reward


@dataclass(frozen=True)
class ScoredImage:
    """One image and its scores.

    Args:
        file: Path relative to the folder, with `/`.
        prompt: The prompt it was scored with.
        scores: Scores by the names of the rewards.
        modified: When the file was last modified, in UTC; empty if it is not known.
    """

    file: str
    prompt: str
    scores: Mapping[str, float]
    modified: str = field(default="", compare=False)


class ScoreTable:
    """The file `scores.csv` in an output folder, and `scoring.json` with the scored folder and the rewards' settings.

    Args:
        output: The output folder.
        scored: The folder of the images.
        rewards: Rewards by name.

    Raises:
        ConfigurationError: The output folder has scores of another folder or of other rewards.
    """

    def __init__(self, output: Path, scored: Path, rewards: Mapping[str, Reward]) -> None:
        self.path = output / "scores.csv"
        self.columns = ["file", "prompt", "modified", *rewards]
        settings = output / "scoring.json"
        described = {"folder": str(scored.resolve()), "rewards": _describe(rewards)}
        if self.path.exists() and settings.exists():
            _check_settings(self.path, _read_settings(settings), described)
        with atomic_path(settings) as partial:
            partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    def read(self) -> list[ScoredImage]:
        """Return the complete rows, and drop an incomplete last one from the file.

        Raises:
            ConfigurationError: The file has other columns, or is damaged.
        """
        if not self.path.exists():
            self.replace([])
            return []
        with self.path.open("rb") as file:
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:
            with writing(self.path):
                self.path.write_bytes(complete)
        try:
            rows = csv.reader(io.StringIO(complete.decode("utf-8"), newline=""))
            if next(rows, None) != self.columns:
                raise ConfigurationError(
                    f"{self.path} has other columns than these rewards; choose another output folder"
                )
            return [
                ScoredImage(file, prompt, dict(zip(self.columns[3:], map(float, scores), strict=True)), modified)
                for file, prompt, modified, *scores in rows
            ]
        except ConfigurationError:
            raise
        except (ValueError, csv.Error) as error:
            raise ConfigurationError(f"{self.path} is damaged ({error}); delete it to score again") from error

    def append(self, rows: Sequence[ScoredImage]) -> None:
        """Add rows to the file."""
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            self._write(file, rows)

    def replace(self, rows: Sequence[ScoredImage]) -> None:
        """Replace all rows of the file."""
        with atomic_path(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(self.columns)
            self._write(file, rows)

    def _write(self, file: io.TextIOBase, rows: Sequence[ScoredImage]) -> None:
        csv.writer(file, lineterminator="\n").writerows(
            [row.file, row.prompt, row.modified, *(repr(row.scores[name]) for name in self.columns[3:])] for row in rows
        )


def modification_time(path: Path) -> str:
    """Return when a file was last modified, in UTC, such as `2026-01-31T12:00:00.123456+00:00`."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()


def write_parquet(rows: Iterable[ScoredImage], path: str | Path) -> None:
    """Write scored images as a Parquet file with the columns `file`, `prompt` and one for each reward.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError as error:
        raise ConfigurationError("writing Parquet files needs pyarrow; run pip install pyarrow") from error
    table = [{"file": row.file, "prompt": str(row.prompt), **row.scores} for row in rows]
    with atomic_path(path) as partial:
        write_table(pyarrow.Table.from_pylist(table), partial)


def _read_settings(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); delete it and scores.csv to score again") from error
    return found if isinstance(found, dict) else {}


def _check_settings(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    if found.get("folder") != wanted["folder"]:
        raise ConfigurationError(
            f"{path} contains scores of the folder {found.get('folder')}; choose another folder with --output, or "
            "delete the file"
        )
    if found != wanted:
        raise ConfigurationError(
            f"{path} contains scores of other rewards, settings or votes; choose another folder with --output, or "
            "delete the file"
        )


def _describe(rewards: Mapping[str, Reward]) -> dict[str, list[dict[str, object]]]:
    """Describe each reward by its classes, settings, weights and votes, so that a change of rewards is detected."""
    return {
        name: [
            {
                "class": type(part).__name__,
                "settings": _settings(part),
                "weights": _fingerprint(part),
                **({"data": version} if (version := part.data_version()) else {}),
            }
            for part in reward.nested_rewards()
        ]
        for name, reward in rewards.items()
    }


def _settings(reward: Reward) -> dict[str, object]:
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    values = {name: value for name, value in sorted(vars(reward).items()) if isinstance(value, plain)}
    derived = ("training", "uses_images", "uses_latents")
    public = {name: redact(value, name) for name, value in values.items() if name[0] != "_" and name not in derived}
    described: dict[str, object] = json.loads(json.dumps(public, default=str))
    return described


def _fingerprint(reward: Reward) -> str | None:
    """Return a hash of up to 64 values of each tensor; None if there are no tensors."""
    tensors = [value for value in reward.state_dict().values() if isinstance(value, Tensor)]
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // 64)][:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if tensors else None
