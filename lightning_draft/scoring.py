"""Score folders of existing images with rewards, without a diffusion model, and compare two folders."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from lightning_draft.arguments import at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_prompts import PromptSource, find_prompts, list_images
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.inputs import from_pil

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScoredImage:
    """One image and its scores.

    Args:
        file: Path relative to the folder, with `/`.
        prompt: The prompt it was scored with.
        scores: Scores by the names of the rewards.
    """

    file: str
    prompt: str
    scores: Mapping[str, float]


def score_folder(
    folder: str | Path,
    rewards: Mapping[str, Reward],
    output: str | Path | None = None,
    *,
    prompts: PromptSource | str = "auto",
    batch_size: int = 8,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[ScoredImage]:
    """Score all images of a folder and its subfolders.

    With `output` each batch is appended to `scores.csv` there; a later call with the same rewards continues after the
    last complete row. Images of one size are scored together, in float32 and without gradients.

    Args:
        folder: Folder of `.png`, `.jpg`, `.jpeg`, `.webp` or `.bmp` files.
        rewards: Rewards by name; the names become columns.
        output: Folder for `scores.csv`; None to write nothing.
        prompts: Where the prompts come from; see `find_prompts`.
        batch_size: Images per call of a reward, at least 1.
        device: Device of the rewards, such as `cuda`.
        progress: Called with the number of images scored and the number of all images after each batch.

    Returns:
        The images in the order of their file names.

    Raises:
        ConfigurationError: There are no images, an image or a prompt cannot be read, or `scores.csv` contains scores of
            other rewards.
    """
    at_least("batch_size", batch_size, 1)
    if not rewards:
        raise ConfigurationError("there are no rewards; give at least one, such as AestheticScore")
    root = Path(folder)
    files = list_images(root)
    texts = find_prompts(root, files, prompts)
    table = None if output is None else _Table(Path(output), list(rewards), _describe(rewards))
    done = {} if table is None else table.read()
    open_files = [file for file in files if (file, texts[file]) not in done]
    for reward in rewards.values():
        reward.eval().requires_grad_(False).to(device)
    for batch in _batches(root, open_files, batch_size):
        rows = _score(root, batch, texts, rewards, device)
        done.update({(row.file, row.prompt): row for row in rows})
        if table is not None:
            table.append(rows)
        if progress is not None:
            progress(len(done), len(files))
    return [done[file, texts[file]] for file in files]


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
    table = [{"file": row.file, "prompt": row.prompt, **row.scores} for row in rows]
    write_table(pyarrow.Table.from_pylist(table), path)


def _describe(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """Describe each reward by its classes and plain settings, so that a change of rewards is detected."""
    return {
        name: "; ".join(
            f"{type(part).__name__} {_settings(part)}" for part in reward.modules() if isinstance(part, Reward)
        )
        for name, reward in rewards.items()
    }


def _settings(reward: Reward) -> dict[str, object]:
    plain = (str, int, float, bool, tuple, dict, type(None))
    return {name: value for name, value in sorted(vars(reward).items()) if isinstance(value, plain) and name[0] != "_"}


def _batches(root: Path, files: Sequence[str], batch_size: int) -> Iterator[list[str]]:
    """Yield files of one size in groups; the sizes are read from the headers, so that no image is decoded twice."""
    sizes = {file: _size(root / file) for file in files}
    for _, group in groupby(sorted(files, key=lambda file: (sizes[file], file)), key=lambda file: sizes[file]):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not an image that can be read: {error}; remove or replace it") from error


def _score(
    root: Path, batch: Sequence[str], texts: Mapping[str, str], rewards: Mapping[str, Reward], device: str
) -> list[ScoredImage]:
    try:
        images = from_pil([Image.open(root / file) for file in batch]).to(device)
    except OSError as error:
        raise ConfigurationError(f"an image among {', '.join(batch)} cannot be read: {error}") from error
    prompts = [texts[file] for file in batch]
    with torch.no_grad():
        scores = {name: reward(images, prompts).tolist() for name, reward in rewards.items()}
    return [
        ScoredImage(file, texts[file], {name: values[i] for name, values in scores.items()})
        for i, file in enumerate(batch)
    ]


class _Table:
    """The file `scores.csv` of a folder, and `rewards.json` with the settings of the rewards."""

    def __init__(self, folder: Path, names: list[str], described: dict[str, str]) -> None:
        self.path = folder / "scores.csv"
        self.names = names
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "rewards.json"
        if self.path.exists() and about.exists() and json.loads(about.read_text(encoding="utf-8")) != described:
            raise ConfigurationError(
                f"{self.path} contains scores of other rewards or settings; choose another output folder, or delete "
                "the file"
            )
        about.write_text(json.dumps(described, indent=1), encoding="utf-8")

    def read(self) -> dict[tuple[str, str], ScoredImage]:
        """Return the complete rows, and drop an incomplete last one from the file."""
        if not self.path.exists():
            self.path.write_text("", encoding="utf-8")
            self._write([["file", "prompt", *self.names]])
            return {}
        text = self.path.read_bytes().decode("utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_bytes(complete.encode())
        rows = list(csv.reader(io.StringIO(complete, newline="")))
        if not rows or rows[0] != ["file", "prompt", *self.names]:
            raise ConfigurationError(f"{self.path} has other columns than these rewards; choose another output folder")
        try:
            scored = [
                ScoredImage(file, prompt, dict(zip(self.names, map(float, scores), strict=True)))
                for file, prompt, *scores in rows[1:]
            ]
        except ValueError as error:
            raise ConfigurationError(f"{self.path} is damaged ({error}); delete it to score again") from error
        return {(row.file, row.prompt): row for row in scored}

    def append(self, rows: Sequence[ScoredImage]) -> None:
        """Add rows to the file."""
        self._write([[row.file, row.prompt, *(repr(row.scores[name]) for name in self.names)] for row in rows])

    def _write(self, rows: list[list[str]]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
