"""List and read image files: rotated as EXIF says, with 8 bits per channel, and with an error that names the file."""

import os
import struct
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.inputs import to_rgb

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged, no images, or too large."""
_ORIENTATION = 0x0112


class UnreadableImageError(ConfigurationError):
    """A file is not an image that can be read; the message names it."""


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and its subfolders, relative to it, in the order of their names.

    Links to files and folders are followed. Names that start with a dot are left out.

    Raises:
        ConfigurationError: There is no such folder, no image in it, or a name is not text in UTF-8.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {str(folder)!r}; give a folder of images")
    found: list[str] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(parent, f)) not in visited]
        images = [file for file in files if file[0] != "." and Path(file).suffix.lower() in SUFFIXES]
        found.extend((Path(parent) / file).relative_to(folder).as_posix() for file in images)
    if not found:
        raise ConfigurationError(
            f"there are no images in {str(folder)!r}; supported suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    unnamed = [name for name in found if not name.isascii() and name != name.encode("utf-8", "replace").decode()]
    if unnamed:
        raise ConfigurationError(f"the file name {unnamed[0]!r} in {str(folder)!r} is not in UTF-8; rename the file")
    return sorted(found)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height as displayed, from the file's header.

    Raises:
        UnreadableImageError: It is not an image that can be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_turned = exif_of(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return (height, width) if is_turned else (width, height)


def exif_of(image: Image.Image) -> Image.Exif:
    """Return the EXIF data in a file's header; Pillow's `getexif` would decode a PNG without any."""
    return Image.Exif() if image.format == "PNG" and "exif" not in image.info else image.getexif()


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB, rotated as its EXIF orientation says, transparent images on a white background.

    Raises:
        UnreadableImageError: It is not an image that can be read.
    """
    try:
        with Image.open(path) as image:
            converted: Image.Image = to_rgb(ImageOps.exif_transpose(image))
            return converted
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UnreadableImageError:
    if path.is_symlink() and not path.exists():
        reason = f"it is a link to {os.readlink(path)}, which does not exist"
    elif isinstance(error, UnidentifiedImageError):
        reason = "its content is not that of an image" if path.stat().st_size else "it is empty"
    else:
        reason = str(error).rstrip(".") or type(error).__name__
    return UnreadableImageError(f"{path} is not an image that can be read: {reason}; remove or replace it")
