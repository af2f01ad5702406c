"""Write files atomically: a reader finds either the previous file or the complete new one."""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_draft.errors import ConfigurationError

_MARK = ".partial"
_PREVIOUS = "-previous"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")  # safetensors and tokenizers report errors as text
_HINTS = {
    errno.ENOSPC: "free some space and resume the run",
    errno.EDQUOT: "free some of your quota and resume the run",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.EACCES: "choose a folder that you may write to",
    errno.EEXIST: "a part of the path is a file, so choose another folder",
    errno.ENOTDIR: "a part of the path is a file, so choose another folder",
    errno.EPERM: "choose a folder that you may write to",
}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which replaces `path` when the context ends without an error.

    The data are on the disk before the replacement, and file permissions follow the umask. After an error the temporary
    file is removed and the previous file is unchanged.

    Args:
        path: The file to write; missing folders are created.

    Raises:
        ConfigurationError: The disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{_MARK}{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # some writers, such as safetensors, create files that only the owner can read
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # such as that of a name that is too long, which has a message already
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces the folder `path` when the context ends without an error.

    The files reach the disk before the replacement. After an error the temporary folder is removed and the previous
    folder is unchanged.

    Args:
        path: The folder to write; missing parent folders are created.

    Raises:
        ConfigurationError: The disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    partial, previous = (path.with_name(f".{path.name}.{os.getpid()}{_MARK}{end}") for end in ("", _PREVIOUS))
    try:
        with writing(path):
            partial.mkdir(parents=True)
            yield partial
            for written in (*partial.rglob("*"), partial):
                _sync(written)
            if path.exists():
                path.rename(previous)
            partial.rename(path)
            _sync(path.parent)
    finally:
        remove(partial)
        if previous.exists() and not path.exists():
            previous.rename(path)
        remove(previous)


@contextmanager
def wait_for_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this context for a folder; file systems without locks do not wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context, convert errors of writing to a `ConfigurationError` with the reason.

    Args:
        path: The file, for the message.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        found = _RUST_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1] or found[2])
        raise _unwritable(path, number, os.strerror(number)) from error


def write_stream(write: Callable[[IO[bytes]], Any], path: str | os.PathLike[str]) -> None:
    """Write a file atomically with a function that receives an open binary file, such as `torch.save`.

    Args:
        write: Called with the open file.
        path: The file.

    Raises:
        ConfigurationError: The disk is full, or the folder cannot be written to.
    """
    with atomic_path(path) as partial, partial.open("wb") as file:
        recorder = _Recorder(file)
        try:
            write(recorder)  # type: ignore[arg-type]
        except RuntimeError:
            # torch's writer raises an error about the file position instead of the file's own error.
            if recorder.error is not None:
                raise recorder.error from None
            raise


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files and folders of killed processes from a folder.

    To replace a folder, a process first renames the old one. If the process was killed before the new one took its
    place, the old one is renamed back.
    """
    for path in folder.glob(f".*{_MARK}*") if folder.is_dir() else ():
        name, _, owner = path.name.split(_MARK)[0].removeprefix(".").rpartition(".")
        if not owner.isdigit() or int(owner) == os.getpid() or _is_running(int(owner)):
            continue
        if path.name.endswith(_PREVIOUS) and not (folder / name).exists():
            path.rename(folder / name)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        with suppress(NotADirectoryError):  # a part of the path is a file
            path.unlink(missing_ok=True)


class _Recorder:
    """A binary file that stores the first error of its writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write data, and store the error if there is one."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def _unwritable(path: Path, number: int | None, reason: str) -> ConfigurationError:
    hint = _HINTS.get(number or 0, "choose another folder")
    return ConfigurationError(f"cannot write {path}: {reason}; {hint}")


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
