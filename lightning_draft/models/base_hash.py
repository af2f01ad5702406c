"""SHA-256 of a base model's weight files, for the headers of LoRA files."""

import hashlib
from functools import cache
from pathlib import Path


def weights_sha256(pretrained: Path, denoiser_folder: Path | None) -> str | None:
    """Return the SHA-256 of the files with the denoiser's weights, in hexadecimal; `None` if they are not local.

    For one file it is the output of `sha256sum`; for several files, it is the SHA-256 of their digests in the order of
    their names.

    Args:
        pretrained: The single file, if the model was loaded from one.
        denoiser_folder: Otherwise the folder of the denoiser.
    """
    if pretrained.is_file():
        files = [pretrained]
    elif denoiser_folder is not None and denoiser_folder.is_dir():
        files = sorted(denoiser_folder.glob("*.safetensors")) or sorted(denoiser_folder.glob("*.bin"))
    else:
        files = []
    digests = [file_sha256(file) for file in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a file that has not changed is read once in a process."""
    file = file.resolve()
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@cache
def _sha256(file: Path, size: int, time: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
