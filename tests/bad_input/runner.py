"""Run a case in an empty folder."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lightning.pytorch.cli import LightningCLI

from lightning_draft.__main__ import main
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import NonFiniteScoreError
from tests.bad_input.cases import Case

_PREFIX = "lightning-draft: "


@dataclass(frozen=True)
class Outcome:
    """What a case left.

    Args:
        status: The exit status; 2 for an exception in Python.
        messages: Messages to the user, without the program's name.
        error: An exception that became no message, with its traceback.
        changed: Files that were written, changed or removed.
    """

    status: int
    messages: tuple[str, ...]
    error: str = ""
    changed: tuple[str, ...] = ()


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in an empty folder and return its outcome; the folder's path in messages becomes `FOLDER`."""
    for name, content in case.files.items():
        _write(folder / name, content)
    if case.config:
        text = case.config
        if case.edit is not None:
            assert case.edit[0] in text, case.edit[0]
            text = text.replace(*case.edit)
        (folder / "small.yaml").write_text(text)
    before = _snapshot(folder)
    with _inside(folder):
        outcome = _command(case.args) if case.args is not None else _call(case, folder)
    after = _snapshot(folder)
    changed = tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
    messages = tuple(message.replace(str(folder), "FOLDER") for message in outcome.messages)
    return Outcome(outcome.status, messages, outcome.error, changed)


def _command(args: tuple[str, ...]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    error = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _loggers_write_to(err), _parsers_kept():
        try:
            status = main(args)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status, error = 1, traceback.format_exc()
    printed = f"\n{err.getvalue()}".split(f"\n{_PREFIX}")[1:]
    return Outcome(status, tuple(text.rstrip("\n") for text in printed), error)


def _call(case: Case, folder: Path) -> Outcome:
    assert case.call is not None
    try:
        case.call(folder)
    except (ConfigurationError, NonFiniteScoreError) as error:
        return Outcome(2, (str(error),))
    except Exception:
        return Outcome(1, (), traceback.format_exc())
    return Outcome(0, ())


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Within this context the folder is the current one; modules imported from it are forgotten afterwards."""
    before, modules, paths = Path.cwd(), set(sys.modules), [*sys.path]
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = paths
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@contextlib.contextmanager
def _loggers_write_to(stream: io.StringIO) -> Iterator[None]:
    """Let Lightning's handlers, which are bound to the error stream of their first use, write to another one."""
    with contextlib.ExitStack() as stack:
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    stack.callback(handler.setStream, handler.setStream(stream) or handler.stream)
        yield


_parsers: dict[str, dict[str, object]] = {}


@contextlib.contextmanager
def _parsers_kept() -> Iterator[None]:
    """Build the parser of each command once, which takes longer than reading a config with it."""
    build = LightningCLI.setup_parser

    def keep(cli: LightningCLI, *args: object) -> None:
        command = str(getattr(cli, "command", ""))
        if command not in _parsers:
            before = set(vars(cli))
            build(cli, *args)  # type: ignore[arg-type]
            _parsers[command] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(_parsers[command])

    with mock.patch.object(LightningCLI, "setup_parser", keep):
        yield


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(str(content))
