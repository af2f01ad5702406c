"""Find the prompts of images in a folder: in sidecar files, image metadata, file names or a table."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import metadata_of
from lightning_draft.prompt_sources import read_prompts

PromptSource = Literal["auto", "sidecar", "metadata", "names"]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_EXIF_DESCRIPTION, _EXIF_COMMENT, _EXIF_IFD = 0x010E, 0x9286, 0x8769


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and its subfolders, relative to it, in the order of their names.

    Raises:
        ConfigurationError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {str(folder)!r}; give a folder of images")
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise ConfigurationError(
            f"there are no images in {str(folder)!r}; supported suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    return files


def find_prompts(folder: Path, files: Sequence[str], source: PromptSource | str = "auto") -> dict[str, str]:
    """Return the prompt of each file.

    Args:
        folder: The folder of the images.
        files: Images, relative to it.
        source: `sidecar`: the text of `NAME.txt` beside `NAME.png`. `metadata`: PNG text under `prompt`, `parameters`
            or `Description`, or the EXIF description or comment. `names`: the file's name without suffix and number,
            `a_red_cat_003.png` is "a red cat". `auto`: the first of these that the file has. Or the path of a table
            (CSV, JSON, Parquet, ...) with the columns `file` and `prompt`.

    Raises:
        ConfigurationError: An image has no prompt in the given source.
    """
    if source in ("auto", "sidecar", "metadata", "names"):
        prompts = {file: _prompt(folder / file, source) for file in files}
    else:
        prompts = _table(source, files)
    missing = [file for file, prompt in prompts.items() if not prompt]
    if missing:
        raise ConfigurationError(
            f"{len(missing)} images have no prompt from prompts={source!r}, such as {missing[0]!r}; write sidecar, "
            "metadata, names, auto, or the path of a table with the columns file and prompt"
        )
    return {file: " ".join(prompt.split()) for file, prompt in prompts.items() if prompt}


def _prompt(path: Path, source: str) -> str | None:
    readers = {"sidecar": _sidecar, "metadata": _metadata, "names": _name}
    chosen = readers.values() if source == "auto" else [readers[source]]
    return next((prompt for prompt in (reader(path) for reader in chosen) if prompt), None)


def _sidecar(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    return " ".join(file.read_text(encoding="utf-8-sig").split()) if file.is_file() else None


def _name(path: Path) -> str | None:
    stem = re.sub(r"[ _-]*\(?\d+\)?$", "", path.stem)
    return " ".join(stem.replace("_", " ").replace("-", " ").split()) or None


def _metadata(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            texts = [image.info.get(name) for name in ("prompt", "parameters", "Description", "comment")]
            exif = image.getexif()
            texts += [exif.get(_EXIF_DESCRIPTION), exif.get_ifd(_EXIF_IFD).get(_EXIF_COMMENT)]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not an image that can be read: {error}; remove or replace it") from error
    return next((found for found in map(_clean, texts) if found), None)


def _clean(text: Any) -> str | None:
    """Return the prompt in a metadata text, without the settings that web interfaces append."""
    if isinstance(text, bytes):
        text = (
            text.removeprefix(b"ASCII\0\0\0").removeprefix(b"UNICODE\0").replace(b"\0", b"").decode("utf-8", "replace")
        )
    if not isinstance(text, str) or text.lstrip().startswith("{"):  # a workflow graph, not a prompt
        return None
    text = re.split(r"\n(?:Negative prompt|Steps):", text)[0]
    return " ".join(text.split()) or None


def _table(source: str, files: Sequence[str]) -> dict[str, str | None]:
    rows = read_prompts(source)
    by_file: dict[str, str] = {}
    for prompt in rows:
        name = metadata_of(prompt).get("file")
        if name is None:
            raise ConfigurationError(f"prompts={source!r} has no column 'file'; it needs the columns file and prompt")
        by_file[Path(str(name)).as_posix()] = str(prompt)
    return {file: by_file.get(file) for file in files}
