"""Models that ship with the package, accepted by name wherever a folder or a hub id is."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("emoji", "emoji-clip")


def resolve(name: str) -> Path | str:
    """The folder of a shipped model, or `name` unchanged: a path or a hub id.

    Args:
        name: `emoji` (a text-to-image pipeline), `emoji-clip` (a CLIP), or anything else.
    """
    folder = FOLDER / name
    return folder if name in NAMES and folder.is_dir() else name
