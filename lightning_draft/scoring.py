"""Score folders of existing images with rewards, without a diffusion model."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from lightning_draft.arguments import integer_at_least, one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_files import UnreadableImageError, image_size, list_images, read_image
from lightning_draft.image_prompts import PromptSource, find_prompts
from lightning_draft.progress import Progress
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.inputs import NonFiniteScoreError, from_pil
from lightning_draft.rewards.latent import describe_no_latents
from lightning_draft.score_table import ScoredImage, ScoreTable, modification_time
from lightning_draft.seeds import scoring

Unreadable = Literal["stop", "skip"]


def score_folder(
    folder: str | Path,
    rewards: Mapping[str, Reward],
    output: str | Path | None = None,
    *,
    prompts: PromptSource | str = "auto",
    batch_size: int = 8,
    device: str = "auto",
    unreadable: Unreadable = "stop",
    progress: Progress | None = None,
) -> list[ScoredImage]:
    """Score all images of a folder and its subfolders.

    With `output` each batch is appended to `scores.csv` there; a later call with the same folder and rewards continues
    after the last complete row, and scores files again that were modified since. Images of one size are scored
    together, in float32 and without gradients; the next batch is decoded meanwhile.

    Args:
        folder: Folder of `.png`, `.jpg`, `.jpeg`, `.webp`, `.bmp`, `.gif` (first frame), `.tif`, `.tiff` or `.avif`
            files. They are rotated as their EXIF orientation says, and transparent images get a white background.
        rewards: Rewards by name; the names become columns.
        output: Folder for `scores.csv`; None to write nothing.
        prompts: Where the prompts come from; see `find_prompts`.
        batch_size: Images per call of a reward, at least 1.
        device: Device of the rewards, such as `cuda`; `auto` is `cuda` if there is a GPU, else `cpu`.
        unreadable: Whether a file that is not a readable image is an error (`stop`), or is left out with a warning.
        progress: Called with the number of images scored and the number of all images, at the start and after each
            batch.

    Returns:
        The images in the order of their file names.

    Raises:
        ConfigurationError: There are no images, an image or a prompt cannot be read, the memory is not sufficient, or
            `scores.csv` contains scores of another folder or other rewards.
    """
    integer_at_least("batch_size", batch_size, 1)
    one_of("unreadable", unreadable, ("stop", "skip"))
    if not rewards:
        raise ConfigurationError("there are no rewards; give at least one, such as AestheticScore")
    for name, reward in rewards.items():
        if reward.uses_latents:
            raise ConfigurationError(f"reward {name!r}: {describe_no_latents(reward)}")
    root, target = Path(folder), _device(device)
    sizes = _sizes(root, list_images(root), unreadable)
    texts = find_prompts(root, list(sizes), prompts)
    table = None if output is None else ScoreTable(Path(output), root, rewards)
    done = {} if table is None else _valid_rows(table, root, texts)
    remaining = {file: size for file, size in sizes.items() if file not in done}
    for reward in rewards.values():
        reward.eval().requires_grad_(False).to(target)
    if progress is not None:
        progress(len(done), len(sizes))
    total = len(sizes)
    for files, images in _images(root, _batches(remaining, batch_size), unreadable):
        total -= len(files) - len(images)
        rows = [row for some in _by_size(images) for row in _score(root, some, texts, rewards, target, batch_size)]
        done.update({row.file: row for row in rows})
        if table is not None:
            table.append(rows)
        if progress is not None:
            progress(len(done), total)
    return [done[file] for file in sizes if file in done]


def _device(name: str) -> str:
    """Return the name of a device that exists.

    Raises:
        ConfigurationError: There is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(f"device={name!r} cannot be used: {reason}; write cpu or auto") from error
    return name


def _valid_rows(table: ScoreTable, root: Path, texts: Mapping[str, str]) -> dict[str, ScoredImage]:
    """Return the rows of files that still exist with the same prompt and modification time, and drop the others."""
    rows = table.read()
    valid = {
        row.file: row
        for row in rows
        if texts.get(row.file) == row.prompt and row.modified == modification_time(root / row.file)
    }
    if len(valid) < len(rows):
        table.replace(list(valid.values()))
    return valid


def _sizes(root: Path, files: Sequence[str], unreadable: Unreadable) -> dict[str, tuple[int, int]]:
    """Return the sizes of the files by name, from their headers, without those that are left out."""
    sizes = {}
    for file in files:
        try:
            sizes[file] = image_size(root / file)
        except UnreadableImageError as error:
            _skip(error, unreadable)
    if not sizes:
        raise ConfigurationError(f"no image in {str(root)!r} can be read")
    return sizes


def _skip(error: UnreadableImageError, unreadable: Unreadable) -> None:
    """Warn that a file is left out, or raise the error again."""
    if unreadable == "stop":
        raise UnreadableImageError(f"{error}, or leave such files out with unreadable=skip") from error
    warnings.warn(f"left out: {str(error).removesuffix('; remove or replace it')}", stacklevel=4)


def _batches(sizes: Mapping[str, tuple[int, int]], batch_size: int) -> Iterator[list[str]]:
    """Yield files of one size in groups."""
    for _, group in groupby(sorted(sizes, key=lambda file: (sizes[file], file)), key=sizes.__getitem__):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _images(
    root: Path, batches: Iterator[list[str]], unreadable: Unreadable
) -> Iterator[tuple[list[str], dict[str, Image.Image]]]:
    """Yield the files of each batch and its images by name; the next batch is decoded by threads meanwhile."""
    with ThreadPoolExecutor() as pool:
        waiting: list[tuple[str, Future[Image.Image]]] = []
        for files in batches:
            following = [(file, pool.submit(read_image, root / file)) for file in files]
            if waiting:
                yield _decoded(waiting, unreadable)
            waiting = following
        if waiting:
            yield _decoded(waiting, unreadable)


def _decoded(
    waiting: Sequence[tuple[str, Future[Image.Image]]], unreadable: Unreadable
) -> tuple[list[str], dict[str, Image.Image]]:
    images = {}
    for file, future in waiting:
        try:
            images[file] = future.result()
        except UnreadableImageError as error:
            _skip(error, unreadable)
    return [file for file, _ in waiting], images


def _by_size(images: Mapping[str, Image.Image]) -> Iterator[dict[str, Image.Image]]:
    """Group decoded images by size; it differs from that in the header if EXIF data follow the pixels."""
    for size in {image.size: None for image in images.values()}:
        yield {file: image for file, image in images.items() if image.size == size}


def _score(
    root: Path,
    images: Mapping[str, Image.Image],
    texts: Mapping[str, str],
    rewards: Mapping[str, Reward],
    device: str,
    batch_size: int,
) -> list[ScoredImage]:
    modified = {file: modification_time(root / file) for file in images}
    prompts = [texts[file] for file in images]
    try:
        batch = from_pil(list(images.values())).to(device)
        scores = {}
        for name, reward in rewards.items():
            with torch.no_grad(), scoring(torch.device(device)):
                scores[name] = reward(batch, prompts).tolist()
    except NonFiniteScoreError as error:
        raise ConfigurationError(f"{error} (the files are among {', '.join(images)})") from error
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"batch_size={batch_size} needs more memory than {device} has; write batch_size={max(1, batch_size // 2)}"
        ) from error
    return [
        ScoredImage(file, texts[file], {name: values[i] for name, values in scores.items()}, modified[file])
        for i, file in enumerate(images)
    ]
