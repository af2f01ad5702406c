"""Models that ship with the package; their names are accepted in place of a folder or a hub id."""

from pathlib import Path

from lightning_draft.errors import ConfigurationError

FOLDER = Path(__file__).parent
NAMES = ("emoji64", "emoji64-clip", "emoji64-judge", "emoji64-judge-eval")


def resolve(name: str) -> Path | str:
    """Return the folder of a shipped model, or `name` unchanged if it is a path or a hub id.

    Args:
        name: `emoji64` (text-to-image pipeline of 64x64 pixels), `emoji64-clip` (CLIP), `emoji64-judge` or
            `emoji64-judge-eval` (classifiers of image quality), or anything else.

    Raises:
        ConfigurationError: It is the name of a shipped model whose files are not there.
    """
    if name not in NAMES:
        return name
    folder = FOLDER / name
    if not folder.is_dir():
        raise ConfigurationError(
            f"the shipped model {name!r} is missing from {FOLDER}: this installation is incomplete; install the "
            "package again, write ./ before the name of a folder of your own, or make the model yourself with "
            "python -m examples.emoji_model.train and python -m examples.emoji_model.export"
        )
    return folder
