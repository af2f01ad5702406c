"""Emoji images with captions: Noto and Twemoji, from npm packages.

`npm` must be installed; the two packages (135 MB) are downloaded once and reduced to one small `.npz` file.

    python -m examples.emoji_model.data --out runs/emoji
"""

import argparse
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VERSION = "16.0.0"
STYLES = {"noto": "google", "twemoji": "twitter"}
QUOTAS = {
    "Animals & Nature": 85,
    "Food & Drink": 75,
    "Objects": 55,
    "Travel & Places": 45,
    "Activities": 25,
    "Smileys & Emotion": 20,
}
"""Number of names of each category that the generator is trained on (305 in total)."""
SKIPPED = {"time", "person", "family", "keycap", "country-flag", "skin-tone"}


@dataclass(frozen=True)
class Emoji:
    """Images with their names and styles.

    Attributes:
        rgba: float32, `(N, 4, size, size)` in [0, 1]; the colors are multiplied by the alpha.
        images: float32, `(N, 3, size, size)` in [0, 1], composited on white.
        names: Name of each image, such as `"red apple"`.
        styles: `"noto"` or `"twemoji"` for each image.
        drawn: bool `(N,)`: the generator is trained on this name.
        held_out: bool `(N,)`: a pair of a trained name and a style that is excluded from training.
    """

    rgba: Tensor
    images: Tensor
    names: list[str]
    styles: list[str]
    drawn: Tensor
    held_out: Tensor

    @property
    def captions(self) -> list[str]:
        """`"<style> <name>"` for each image."""
        return [f"{style} {name}" for style, name in zip(self.styles, self.names, strict=True)]

    def row(self, style: str, name: str) -> int:
        """Return the index of the image of `name` in `style`."""
        return self._rows[f"{style} {name}"]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {caption: row for row, caption in enumerate(self.captions)}

    @classmethod
    def load(cls, path: Path) -> "Emoji":
        """Read the file that `prepare` wrote."""
        with np.load(path) as file:
            rgba = torch.from_numpy(file["rgba"]).permute(0, 3, 1, 2).float() / 255
            rgba[:, :3] *= rgba[:, 3:]
            return cls(
                rgba=rgba,
                images=rgba[:, :3] + 1 - rgba[:, 3:],
                names=file["names"].tolist(),
                styles=file["styles"].tolist(),
                drawn=torch.from_numpy(file["drawn"]),
                held_out=torch.from_numpy(file["held_out"]),
            )


def prepare(out: Path, size: int = 64, seed: int = 0) -> Path:
    """Download the packages if necessary, reduce them to `out/emoji<size>.npz` and return its path."""
    path = out / f"emoji{size}.npz"
    if path.exists():
        return path
    out.mkdir(parents=True, exist_ok=True)
    folders = {style: _package(f"emoji-datasource-{package}", out) for style, package in STYLES.items()}
    entries = _entries(folders["noto"] / "emoji.json")
    images, names, styles, categories = [], [], [], []
    for name, (category, file) in entries.items():
        for style, package in STYLES.items():
            images.append(_read_image(folders[style] / "img" / package / "64" / file, size))
            names.append(name)
            styles.append(style)
            categories.append(category)
    batch = np.stack(images)
    drawn = _distinct(_on_white(batch, 32), names, categories)
    held_out = _held_out(names, drawn, seed)
    np.savez_compressed(path, rgba=batch, names=names, styles=styles, drawn=drawn, held_out=held_out)
    return path


def _package(name: str, out: Path) -> Path:
    folder = out / name
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "npm is not installed, and it is needed to download the emoji images; install it, for "
            "example with apt-get install npm"
        )
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        subprocess.run([npm, "pack", "--silent", f"{name}@{VERSION}"], cwd=temporary, check=True)
        (archive,) = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (Path(temporary) / "package").rename(folder)
    return folder


def _entries(path: Path) -> dict[str, tuple[str, str]]:
    """Return (category, file) by name for every emoji with at most four words that exists in both styles."""
    entries: dict[str, tuple[str, str]] = {}
    for entry in json.loads(path.read_text()):
        name = re.sub(r"[^a-z0-9 ]", "", entry["name"].lower().replace("-", " ")).strip()
        both = entry["has_img_google"] and entry["has_img_twitter"]
        wanted = entry["category"] in QUOTAS and entry["subcategory"] not in SKIPPED
        if both and wanted and len(name.split()) <= 4:
            entries.setdefault(name, (entry["category"], entry["image"]))
    return entries


def _read_image(path: Path, size: int) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGBA").resize((size, size), Image.Resampling.BOX))


def _on_white(batch: np.ndarray, size: int) -> np.ndarray:
    """Composite uint8 `(N, S, S, 4)` on white and reduce to `(N, size, size, 3)`."""
    color, alpha = np.split(batch.astype(np.float32) / 255, [3], axis=-1)
    images = color * alpha + 1 - alpha
    factor = images.shape[1] // size
    reduced = images.reshape(len(images), size, factor, size, factor, 3).mean((2, 4))
    return (reduced * 255).round().astype(np.uint8)


def _distinct(images: np.ndarray, names: list[str], categories: list[str]) -> np.ndarray:
    """Mark the names that the generator is trained on: short ones first, and none that resembles a chosen one."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    chosen: list[int] = []
    counts = dict.fromkeys(QUOTAS, 0)
    order = sorted(range(0, len(names), len(STYLES)), key=lambda i: (len(names[i].split()), i))
    for i in order:
        pair = slice(i, i + len(STYLES))
        if len(names[i].split()) > 3 or counts[categories[i]] >= QUOTAS[categories[i]]:
            continue
        rows = [j + k for j in chosen for k in range(len(STYLES))]
        if rows and np.square(flat[pair, None] - flat[None, rows]).mean(-1).min() < 0.02:
            continue
        chosen.append(i)
        counts[categories[i]] += 1
    drawn = np.zeros(len(names), dtype=bool)
    for i in chosen:
        drawn[i : i + len(STYLES)] = True
    return drawn


def _held_out(names: list[str], drawn: np.ndarray, seed: int, share: float = 0.1) -> np.ndarray:
    """Hold out one style of a fifth of the trained names: a tenth of the pairs, whose other style is trained on."""
    generator = np.random.default_rng(seed)
    first = np.flatnonzero(drawn)[:: len(STYLES)]
    picked = generator.choice(first, int(len(first) * len(STYLES) * share), replace=False)
    held_out = np.zeros(len(names), dtype=bool)
    held_out[picked + generator.integers(0, len(STYLES), len(picked))] = True
    return held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    print(prepare(arguments.out, arguments.size))
