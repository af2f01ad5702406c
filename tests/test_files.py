"""Files and folders are written completely or not at all, and temporary files of killed processes are removed."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_folder, atomic_path, remove_partial_files


def test_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with atomic_path(file) as partial:
        partial.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_path(file) as partial:
        partial.write_text("new \ud800", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert file.read_text() == "old"


def test_folder_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "lora" / "best"
    for content in ("old", "new"):
        with atomic_folder(folder) as partial:
            (partial / "unet").mkdir()
            (partial / "unet" / content).write_text(content)
    assert [path.name for path in folder.rglob("*")] == ["unet", "new"]
    full = pytest.raises(ConfigurationError, match="cannot write .*best: No space left on device")
    with full, atomic_folder(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in folder.rglob("*")] == ["unet", "new"]
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: File too large (os error 27)",
        'Error while serializing: IoError(Os { code: 27, kind: FileTooLarge, message: "File too large" })',
    ],
)
def test_errors_of_the_operating_system_reported_as_text_become_one_message(tmp_path: Path, text: str) -> None:
    """Of safetensors and tokenizers, whose exceptions are no OSError."""
    with (
        pytest.raises(ConfigurationError, match="cannot write .*best: File too large"),
        atomic_folder(tmp_path / "best"),
    ):
        raise Exception(text)


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_path_through_a_file_is_rejected(tmp_path: Path, write: type) -> None:
    (tmp_path / "file").touch()
    for place in ("file/x.png", "file/new/x.png"):
        with pytest.raises(ConfigurationError, match="a part of the path is a file"), write(tmp_path / place):
            pass


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path, write: type) -> None:
    process = os.fork()
    if process == 0:
        with write(tmp_path / "config.yaml"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_process_killed_while_replacing_it_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "best"
    with atomic_folder(folder) as partial:
        (partial / "weights").write_text("old")
    process = os.fork()
    if process == 0:
        rename = Path.rename

        def killed(path: Path, target: Path) -> Path:
            if target == folder:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", killed)
        with atomic_folder(folder) as partial:
            (partial / "weights").write_text("new")
    os.waitpid(process, 0)
    assert not folder.exists()
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (folder / "weights").read_text() == "old"


@pytest.mark.parametrize("step", range(12))
def test_a_folder_survives_a_kill_at_each_step_of_its_replacement(tmp_path: Path, step: int) -> None:
    """The old folder, or the new one, is complete after the temporary files are removed."""
    target = tmp_path / "best"
    target.mkdir()
    for name in ("a", "b"):
        (target / name).write_text("old")
    child = os.fork()
    if child == 0:
        _replace_and_exit(target, step)
    os.waitpid(child, 0)
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert {path.name: path.read_text() for path in target.iterdir()} in (
        dict.fromkeys("ab", "old"),
        dict.fromkeys("ac", "new"),
    )


def _replace_and_exit(target: Path, step: int) -> None:
    """Replace a folder, and exit before system call number `step` of those that change or sync files."""
    calls = iter(range(1000))

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                os._exit(0)
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "unlink", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)
    with atomic_folder(target) as partial:
        for name in ("a", "c"):
            (partial / name).write_text("new")
    os._exit(0)
