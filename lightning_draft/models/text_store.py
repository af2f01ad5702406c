"""A cache of prompt embeddings on the disk, read through memory maps."""

import hashlib
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path, remove_partial_files, wait_for_lock, writing
from lightning_draft.models.base_hash import file_sha256
from lightning_draft.models.text_cache import Embedding, TextCache, computed

SHARD = 2**25
"""Bytes of embeddings from which on a shard is written."""


class TextStore(TextCache):
    """A cache of prompt embeddings in a folder; they are not kept in memory.

    The embeddings are in `.safetensors` shards, which never change once they are written. Several processes may use the
    folder at the same time. A process that is killed loses only the embeddings that are not in a shard yet. Each
    embedding has a checksum, which is compared when it is read.

    Args:
        folder: Folder for the embeddings of one set of text encoders; see `fingerprint`.

    Raises:
        ConfigurationError: The folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._pending: dict[str, Embedding] = {}
        self._shards: dict[str, tuple[str, str]] = {}
        self._read: dict[str, tuple[str, ...]] = {}
        _create(folder)
        self._refresh()

    def __contains__(self, key: Hashable) -> bool:
        """Return whether the embedding is cached."""
        digest = _digest(key)
        return digest in self._pending or digest in self._shards

    def get(self, key: Hashable, embed: Callable[[], Embedding], device: str, keep: bool = False) -> Embedding:
        """Return an embedding, which is computed if it is not cached, and then written within `writing`."""
        digest = _digest(key)
        if digest in self._pending:
            return self._pending[digest]
        if digest in self._shards:
            return self._load(digest)
        self._pending[digest] = embedding = computed(embed, device)
        if sum(map(_size, self._pending.values())) >= SHARD:
            self._write()
        return embedding

    def check_space(self, size: int) -> None:
        """Check that the disk has space for embeddings that are not written yet.

        Args:
            size: The size in bytes of the embeddings that are not computed yet.

        Raises:
            ConfigurationError: It has too little.
        """
        free = shutil.disk_usage(self.folder).free - sum(map(_size, self._pending.values()))
        if size > free:
            raise ConfigurationError(
                f"text.cache={self.folder.parent} needs {size / 2**30:.1f} GiB for the prompts that are not embedded "
                f"yet, and {max(0, free) / 2**30:.1f} GiB are free; write a folder on a larger disk, or null for no "
                "cache on the disk"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process writes; within this context, computed embeddings are written to the folder."""
        _create(self.folder)  # again if it was deleted
        if not os.access(self.folder, os.W_OK):
            raise ConfigurationError(
                f"text.cache: {self.folder} cannot be written to, and lacks embeddings of some prompts; write another "
                "folder, or null for no cache on the disk"
            )
        with wait_for_lock(self.folder):
            remove_partial_files(self.folder)
            self._refresh()
            try:
                yield
            finally:
                self._write()

    def _refresh(self) -> None:
        """Find the embeddings in shards that were written since the last call."""
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            if file.name in self._read:
                continue
            try:
                with safe_open(file, framework="pt") as content:
                    checksums = content.metadata() or {}
                    names = tuple(sorted({name.partition(".")[2] for name in content.keys()}))  # noqa: SIM118
                if not checksums:
                    raise SafetensorError("it has no checksums")
            except (SafetensorError, OSError) as error:
                warnings.warn(f"{file} is damaged and not used ({error}); its prompts are embedded again", stacklevel=2)
                checksums, names = {}, ()
            self._read[file.name] = names
            self._shards |= {digest: (file.name, checksum) for digest, checksum in checksums.items()}

    def _load(self, digest: str) -> Embedding:
        name, checksum = self._shards[digest]
        file = self.folder / name
        try:
            with safe_open(file, framework="pt") as content:
                embedding = {each: content.get_tensor(f"{digest}.{each}") for each in self._read[name]}
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, str(error)) from error
        if _checksum(embedding) != checksum:
            raise _unreadable(file, "the checksum of an embedding is wrong")
        return embedding

    def _write(self) -> None:
        if not self._pending:
            return
        tensors = {
            f"{digest}.{name}": tensor.contiguous()
            for digest, embedding in self._pending.items()
            for name, tensor in embedding.items()
        }
        checksums = {digest: _checksum(embedding) for digest, embedding in self._pending.items()}
        shard = hashlib.sha256("".join(self._pending).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{shard}.safetensors") as partial:
            save_file(tensors, partial, checksums)
        self._pending = {}
        self._read.pop(f"{shard}.safetensors", None)  # it may replace a damaged one
        self._refresh()


def fingerprint(pipeline: Any, encoders: Sequence[str], settings: Sequence[object], single_file: Path | None) -> str:
    """Return a name for the text encoders of a pipeline, which changes with their files and settings.

    Args:
        pipeline: A pipeline of diffusers with its tokenizers.
        encoders: Names of the text encoders.
        settings: What embeddings depend on besides the files of text encoders and tokenizers.
        single_file: The single file of the pipeline, which may contain text encoders.

    Raises:
        ConfigurationError: A text encoder or tokenizer has no files.
    """
    digest = hashlib.sha256(repr(tuple(settings)).encode())
    if single_file is not None:
        digest.update(file_sha256(single_file).encode())
    for encoder in encoders:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        folder = _folder(getattr(pipeline, tokenizer).name_or_path, tokenizer)
        if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
            digest.update(f"{encoder} {folder.name}".encode())  # a commit of the hub
            continue
        for name in (encoder, tokenizer):
            files = sorted(file for file in (folder / name).rglob("*") if file.is_file())
            if not files and (single_file is None or name == tokenizer):
                raise ConfigurationError(
                    f"text.cache: the files of the {name} are not in {folder}; write null for no cache on the disk"
                )
            for file in files:
                digest.update(f"{file.relative_to(folder)} {file_sha256(file)}".encode())
    return digest.hexdigest()[:32]


def _folder(source: str, tokenizer: str) -> Path:
    """Return the folder of the pipeline from which a tokenizer was read, by its `name_or_path`."""
    path = Path(source)
    return path if (path / tokenizer).is_dir() else path.parent


def _create(folder: Path) -> None:
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"text.cache: {error}") from error


def _size(embedding: Embedding) -> int:
    return sum(tensor.nbytes for tensor in embedding.values())


def _checksum(embedding: Embedding) -> str:
    value = 0
    for _, tensor in sorted(embedding.items()):
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _unreadable(file: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{file} of text.cache cannot be read ({reason}); delete it if it is there, and continue the run with "
        "--resume auto, which embeds its prompts again"
    )


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]
