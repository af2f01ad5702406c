"""Pairs of images in folders, for people to vote on."""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from lightning_draft.errors import ConfigurationError
from lightning_draft.image_files import list_images, read_image
from lightning_draft.image_prompts import find_prompts
from lightning_draft.votes import Pair, image_key, one_line


def pairs_of_folders(folders: Sequence[str | Path], prompts: str = "auto") -> tuple[list[Pair], dict[str, Path]]:
    """Return the pairs of different images with the same prompt, in a random order that is always the same.

    Args:
        folders: One folder, or several: then the images of a pair are from different folders.
        prompts: Where the prompts come from; see `find_prompts`.

    Returns:
        The pairs, and the files by the keys of the images.

    Raises:
        ConfigurationError: There are no images, no prompts or no pairs.
    """
    files: dict[str, Path] = {}
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for number, folder in enumerate(map(Path, folders)):
        names = list_images(folder)
        for name, prompt in find_prompts(folder, names, prompts).items():
            key = image_key(read_image(folder / name))
            files[key] = folder / name
            by_prompt.setdefault(one_line(prompt), []).append((number, key))
    pairs = {
        pair.id: pair
        for prompt, images in by_prompt.items()
        for (here, first), (there, second) in combinations(images, 2)
        if first != second and (len(folders) == 1 or here != there)
        for pair in [Pair(first, second, prompt)]
    }
    if not pairs:
        raise ConfigurationError(
            f"there are no two different images of the same prompt in {', '.join(map(str, folders))}; give two folders "
            "with images of the same prompts, or the prompts with --prompts"
        )
    ordered = list(pairs.values())
    random.Random(0).shuffle(ordered)
    return ordered, files
