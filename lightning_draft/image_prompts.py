"""Find the prompts of images in a folder: in sidecar files, image metadata, file names or a table."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lightning_draft.errors import ConfigurationError
from lightning_draft.image_files import UNREADABLE, exif_of
from lightning_draft.prompt import Prompt, metadata_of
from lightning_draft.prompt_sources import read_prompts

PromptSource = Literal["auto", "sidecar", "metadata", "names", "none"]
_EXIF_DESCRIPTION, _EXIF_COMMENT, _EXIF_IFD = 0x010E, 0x9286, 0x8769
_FILE_COLUMNS = ("file", "file_name")


def find_prompts(folder: Path, files: Sequence[str], source: PromptSource | str = "auto") -> dict[str, str]:
    """Return the prompt of each file.

    Args:
        folder: The folder of the images.
        files: Images, relative to it.
        source: `sidecar`: the text of `NAME.txt` beside `NAME.png`. `metadata`: PNG text under `prompt`, `parameters`
            or `Description`, or the EXIF description or comment. `names`: the file's name without suffix and number,
            `a_red_cat_003.png` is "a red cat". `auto`: the first of these that the file has. `none`: an empty prompt,
            for rewards that ignore it. Or the path of a table (CSV, JSON, Parquet, ...) with the columns `file` (or
            `file_name`, relative to the folder) and `prompt`; further columns become metadata for the rewards.

    Raises:
        ConfigurationError: An image has no prompt in the given source.
    """
    if source == "none":
        return dict.fromkeys(files, "")
    if source in ("auto", "sidecar", "metadata", "names"):
        prompts = {file: _prompt(folder / file, source) for file in files}
    else:
        prompts = _table(source, folder, files)
    missing = [file for file, prompt in prompts.items() if not prompt]
    if missing:
        raise ConfigurationError(
            f"{len(missing)} of {len(files)} images have no prompt in the source prompts={source!r}, such as "
            f"{missing[0]!r}; write sidecar, metadata, names, auto, or the path of a table with the columns file and "
            "prompt, or none if the rewards ignore the prompt"
        )
    return {file: Prompt(" ".join(text.split()), metadata_of(text)) for file, text in prompts.items() if text}


def _prompt(path: Path, source: str) -> str | None:
    readers = {"sidecar": _sidecar, "metadata": _metadata, "names": _name}
    chosen = readers.values() if source == "auto" else [readers[source]]
    return next((prompt for prompt in (reader(path) for reader in chosen) if prompt), None)


def _sidecar(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not text in UTF-8 ({error}); save it in UTF-8") from error


def _name(path: Path) -> str | None:
    stem = re.sub(r"[ _-]*\(?\d+\)?$", "", path.stem)
    return " ".join(stem.replace("_", " ").replace("-", " ").split()) or None


def _metadata(path: Path) -> str | None:
    """Return the prompt in an image's metadata; None also for files that are no images."""
    try:
        with Image.open(path) as image:
            texts = [image.info.get(name) for name in ("prompt", "parameters", "Description", "comment")]
            exif = exif_of(image)
            texts += [exif.get(_EXIF_DESCRIPTION), exif.get_ifd(_EXIF_IFD).get(_EXIF_COMMENT)]
    except UNREADABLE:
        return None
    return next((found for found in map(_clean, texts) if found), None)


def _clean(text: Any) -> str | None:
    """Return the prompt in a metadata text, without the settings that web interfaces append."""
    if isinstance(text, bytes):
        text = _decode(text)
    if not isinstance(text, str) or text.lstrip().startswith("{"):  # a workflow graph, not a prompt
        return None
    text = re.split(r"\n(?:Negative prompt|Steps):", text)[0]
    return " ".join(text.split()) or None


def _decode(comment: bytes) -> str:
    """Decode an EXIF user comment, which starts with the name of its encoding."""
    if not comment.startswith(b"UNICODE\0"):
        return comment.removeprefix(b"ASCII\0\0\0").replace(b"\0", b"").decode("utf-8", "replace")
    text = comment.removeprefix(b"UNICODE\0")
    is_big_endian = text[:1] == b"\0"
    return text.decode("utf-16-be" if is_big_endian else "utf-16-le", "replace")


def _table(source: str, folder: Path, files: Sequence[str]) -> dict[str, str | None]:
    by_file: dict[str, str] = {}
    for prompt in read_prompts(source):
        columns = metadata_of(prompt)
        name = next((columns[column] for column in _FILE_COLUMNS if column in columns), None)
        if name is None:
            raise ConfigurationError(f"prompts={source!r} has no column 'file'; it needs the columns file and prompt")
        file = _relative(Path(str(name)), folder)
        if by_file.setdefault(file, prompt) != prompt:
            raise ConfigurationError(
                f"prompts={source!r} has two prompts for {file!r}: {str(by_file[file])!r} and {str(prompt)!r}; remove "
                "one of them"
            )
    return {file: by_file.get(file) for file in files}


def _relative(path: Path, folder: Path) -> str:
    """Return a path relative to the folder, also if it was written with the folder before it."""
    for start in (folder, folder.resolve()):
        if path.is_relative_to(start):
            return path.relative_to(start).as_posix()
    return path.as_posix()
