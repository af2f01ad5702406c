"""Votes of people on pairs of images: files, pairs that need a vote, and scores fitted to the votes.

A folder of votes contains `votes.csv`, to which the vote page appends one line for each vote. A training run that waits
for votes also writes `pairs.csv` and the images under `images`. Images are identified by a hash of their pixels, so
that votes stay valid when files are renamed, and a resumed run finds the votes on the same images.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_draft.files import atomic_path, writing
from lightning_draft.preferences import bradley_terry

if TYPE_CHECKING:
    from PIL import Image

WINNERS = {"first": 1.0, "second": 0.0, "tie": 0.5}
_VOTE_COLUMNS = ("first", "second", "winner", "prompt", "time")
_PAIR_COLUMNS = ("first", "second", "prompt")
_KEY = re.compile("[0-9a-f]{32}")

PairId = tuple[frozenset[str], str]
"""The keys of two images without their order, and the prompt."""

Votes = Mapping[PairId, tuple["Pair", float]]
"""For each pair: the pair as it was voted on, and the preference for its first image."""


@dataclass(frozen=True)
class Pair:
    """Two images of the same prompt, by their keys.

    Args:
        first: Key of the first image.
        second: Key of the second image.
        prompt: Their prompt, in one line.
    """

    first: str
    second: str
    prompt: str

    @property
    def id(self) -> PairId:
        """The pair without the order of its images."""
        return frozenset((self.first, self.second)), self.prompt

    @property
    def key(self) -> str:
        """A hash of the pair with the order of its images, 32 hexadecimal digits."""
        return hashlib.sha256(f"{self.first} {self.second} {self.prompt}".encode("utf-8", "replace")).hexdigest()[:32]


class VoteFolder:
    """The files of a folder of votes; several processes may use them at the same time.

    Args:
        folder: The folder; it is created when something is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.votes_file = self.folder / "votes.csv"
        self.pairs_file = self.folder / "pairs.csv"

    def votes(self) -> dict[PairId, tuple[Pair, float]]:
        """Return the votes; the last vote on a pair counts, and incomplete lines are ignored."""
        found: dict[PairId, tuple[Pair, float]] = {}
        for first, second, winner, prompt, _ in _read(self.votes_file, _VOTE_COLUMNS):
            if winner in WINNERS:
                pair = Pair(first, second, prompt)
                found[pair.id] = pair, WINNERS[winner]
        return found

    def add_vote(self, pair: Pair, winner: str) -> None:
        """Append a vote: `first`, `second` or `tie`. It is on the disk when the method returns."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        _append(self.votes_file, _VOTE_COLUMNS, [(pair.first, pair.second, winner, pair.prompt, time)])

    def pairs(self) -> list[Pair]:
        """Return the pairs that training runs have asked for, the newest first."""
        found: dict[PairId, Pair] = {}
        for row in _read(self.pairs_file, _PAIR_COLUMNS):
            pair = Pair(*row)
            found.pop(pair.id, None)
            found[pair.id] = pair
        return list(found.values())[::-1]

    def request(self, pairs: Sequence[Pair], images: Mapping[str, "Image.Image"]) -> None:
        """Write pairs and their images for the vote page.

        Args:
            pairs: The pairs.
            images: Images by their keys.
        """
        for key, image in images.items():
            if not self.image(key).exists():
                with atomic_path(self.image(key)) as partial:
                    image.save(partial)
        _append(self.pairs_file, _PAIR_COLUMNS, [(pair.first, pair.second, pair.prompt) for pair in pairs])

    def image(self, key: str) -> Path:
        """Return the file of an image that a training run has written."""
        return self.folder / "images" / f"{key}.png"


def image_key(image: "Image.Image") -> str:
    """Return a hash of the size and the pixels of an RGB image, 32 hexadecimal digits."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()[:32]


def one_line(prompt: str) -> str:
    """Return a prompt in one line, as it is stored."""
    return " ".join(prompt.split())


def fit_votes(votes: Votes, prior_std: float) -> dict[tuple[str, str], float]:
    """Fit Bradley-Terry scores to the votes on the images of each prompt.

    Args:
        votes: From `VoteFolder.votes`.
        prior_std: Standard deviation of the scores' Gaussian prior.

    Returns:
        Scores by prompt and key of the image; their mean is 0 for each prompt.
    """
    by_prompt: dict[str, list[tuple[Pair, float]]] = {}
    for pair, preference in votes.values():
        by_prompt.setdefault(pair.prompt, []).append((pair, preference))
    scores: dict[tuple[str, str], float] = {}
    for prompt, rows in by_prompt.items():
        keys = sorted({key for pair, _ in rows for key in (pair.first, pair.second)})
        wins = torch.zeros(1, len(keys), len(keys), dtype=torch.float64)
        for pair, preference in rows:
            first, second = keys.index(pair.first), keys.index(pair.second)
            wins[0, first, second] += preference
            wins[0, second, first] += 1 - preference
        fitted = bradley_terry(wins, prior_std)[0].tolist()
        scores.update({(prompt, key): score for key, score in zip(keys, fitted, strict=True)})
    return scores


def _read(path: Path, columns: Sequence[str]) -> Iterable[list[str]]:
    """Yield the complete rows of a file that start with the keys of two images."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return
    # Each line is read by itself: an incomplete line may end within quotes.
    rows = map(_row, text.split("\n")[:-1])
    yield from (row for row in rows if len(row) == len(columns) and all(_KEY.fullmatch(key) for key in row[:2]))


def _row(line: str) -> list[str]:
    """Return the fields of a line, none if it is damaged."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _append(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Append rows with one system call, and wait until they are on the disk.

    A line that another process left incomplete is ended first, and is then ignored by readers.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.lseek(handle, 0, os.SEEK_END)
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            if size == 0:
                writer.writerow(columns)
            elif os.pread(handle, 1, size - 1) != b"\n":
                text.write("\n")
            writer.writerows(rows)
            os.write(handle, text.getvalue().encode())
            os.fsync(handle)
        finally:
            os.close(handle)
