"""Reward weights: find published files on the hub or on disk, verify them, and read them without running code."""

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights as its authors published it.

    Args:
        repo: Id of the repository.
        name: Path in that repository.
        size: Size in bytes; None if it is not known.
        sha256: Hexadecimal digest of the content; None if it is not known.
        host: `hub`: files are downloaded; `GitHub`: the user must download them.
    """

    repo: str
    name: str
    size: int | None = None
    sha256: str | None = None
    host: Literal["hub", "GitHub"] = "hub"

    def __str__(self) -> str:
        """Return name and repository, for messages."""
        return f"{Path(self.name).name} of {self.host} repository {self.repo}"


def find_file(published: PublishedFile, local: str | None = None, argument: str = "weights") -> Path:
    """Return the path of a file: `local` if given, else the file in the hub's cache, downloaded once.

    Size and hash are verified if they are known. A local file with another name than the published one is not verified.

    Args:
        published: The published file.
        local: A file, or the folder that contains it.
        argument: The user's name for `local`, for messages.

    Raises:
        ConfigurationError: The file is missing, cannot be downloaded, or differs from the published file.
    """
    path = _download(published, argument) if local is None else _given(published, local, argument)
    if path.name == Path(published.name).name:
        _verify(path, published, argument)
    return path


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle that contains only tensors and plain containers.

    Args:
        path: A `.safetensors` file; any other is read by `torch.load` with `weights_only`.
        key: Key of the state dict in a pickle, such as `state_dict`; None if the pickle is the state dict.

    Raises:
        ConfigurationError: It cannot be read, or contains no state dict.
    """
    try:
        content = _read(path)
    except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError, _safetensors_error()) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"{path} cannot be read as weights: {reason}; it must be a safetensors file, or a pickle that contains "
            "only tensors"
        ) from error
    if key is not None and isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        inside = "" if key is None else f" under {key!r}"
        raise ConfigurationError(f"{path} contains no state dict{inside}: it must map names to tensors")
    return dict(content)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy every tensor into the module's parameter or buffer of that name, in the module's precision.

    Args:
        module: Receives the tensors.
        tensors: The state dict of the module.
        source: Where they come from, for messages.

    Raises:
        ConfigurationError: Names or shapes differ.
    """
    check_state_dict(module.state_dict(), tensors, source)
    module.load_state_dict(dict(tensors))


def check_state_dict(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path | str) -> None:
    """Check that a state dict has the names and the shapes expected of it, and nothing else.

    Args:
        expected: A state dict that fits; its tensors may be on the meta device.
        found: The one to check.
        source: Where it comes from, for messages.

    Raises:
        ConfigurationError: It does not fit; the message lists the first few names.
    """
    advice = "give the file that the reward names"
    for verb, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ConfigurationError(
                f"{source} does not fit: it {verb} tensors ({len(names)}), among them {first}; {advice}"
            )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ConfigurationError(
                f"{source} does not fit: {name} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}; "
                f"{advice}"
            )


def _given(published: PublishedFile, local: str, argument: str) -> Path:
    path = Path(local).expanduser()
    if path.is_dir():
        path = path / Path(published.name).name
    if not path.is_file():
        raise ConfigurationError(
            f"{argument}={local!r}: {path} does not exist; give a file or its folder, or leave {argument} "
            f"out to use {published}"
        )
    return path


def _download(published: PublishedFile, argument: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if published.host != "hub":
        raise ConfigurationError(
            f"{published} is not downloaded automatically; download it and write "
            f"{argument}=FOLDER/{Path(published.name).name}"
        )
    with suppress(LocalEntryNotFoundError):  # cached files need no connection
        return Path(hf_hub_download(published.repo, published.name, local_files_only=True))
    try:
        return Path(hf_hub_download(published.repo, published.name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reason
        raise ConfigurationError(
            f"{published} is not in the hub's cache on this machine and could not be downloaded ({reason}); download "
            f"it on a machine with a connection and write {argument}=FOLDER/{Path(published.name).name}"
        ) from error


def _verify(path: Path, published: PublishedFile, argument: str) -> None:
    difference = None
    size = path.stat().st_size
    if published.size is not None and size != published.size:
        difference = f"it has {size:,} bytes and not {published.size:,}"
    elif published.sha256 is not None and (digest := _sha256(path)) != published.sha256:
        difference = f"its SHA-256 starts with {digest[:12]} and not with {published.sha256[:12]}"
    if difference is not None:
        raise ConfigurationError(
            f"{path} is not {published}: {difference}, so the download was cut short or the file is damaged; delete "
            f"{path.resolve()} and download it again. If the file is meant to differ, rename it and write "
            f"{argument}=ITS_NEW_NAME"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
