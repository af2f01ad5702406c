"""Start a command repeatedly, each time in a new process, without repeated imports and parsing."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.kill_moments import Kill
from lightning_draft.__main__ import main as command_line
from lightning_draft.cli.app import DraftCLI

PATIENCE_S = 120.0
_OTHER_FILE_SYSTEM = Path("/dev/shm")


@dataclass(frozen=True)
class Attempt:
    """One start of the command.

    Args:
        folder: The current folder of the process; its output is appended to `log.txt` there.
        kill: How the process is killed, if it is.
        seconds: Time until the kill, for kills after a time.
    """

    folder: Path
    kill: Kill | None = None
    seconds: float = 0.0


class Launcher:
    """A process that has parsed a `lightning-draft` command and forks for each attempt to run it.

    Args:
        arguments: Arguments of the command, with absolute paths.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._requests, other = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() == 0:
            self._requests.close()
            _end(lambda: _serve(arguments, other))
        other.close()

    def attempt(self, attempt: Attempt) -> int | None:
        """Start the command; return its exit status, negative for a signal, or `None` if it does not end."""
        self._requests.send(attempt)
        return self._requests.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self._requests.send(None)
        os.wait()


def _serve(arguments: list[str], requests: Connection) -> int:
    """Parse the command, and run it in a fork for each request."""
    parse: Any = DraftCLI.parse_arguments

    def parse_arguments(self: DraftCLI, parser: Any, args: Any) -> None:
        """Parse once; then each request continues from here in a fork."""
        parse(self, parser, args)
        while True:
            attempt = requests.recv()
            if attempt is None:
                os._exit(0)
            process = os.fork()
            if process == 0:
                _prepare(attempt)
                return
            requests.send(_wait(process, attempt))

    DraftCLI.parse_arguments = parse_arguments  # type: ignore[method-assign]
    return command_line(arguments)


def _prepare(attempt: Attempt) -> None:
    """Set up this process as if it had been started in the attempt's folder."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    attempt.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(attempt.folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    print(f"-- {attempt.kill or 'not killed'}", flush=True)
    if attempt.kill is None:
        return
    if attempt.kill.other_tmpdir and _OTHER_FILE_SYSTEM.is_dir():
        os.environ["TMPDIR"], tempfile.tempdir = str(_OTHER_FILE_SYSTEM), None
    attempt.kill.install()


def _wait(process: int, attempt: Attempt) -> int | None:
    """Wait for the end of a process; kill it after a time if the attempt requires it."""
    started, kill = time.monotonic(), attempt.kill
    due = kill is not None and kill.moment == "time"
    while True:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if due and kill is not None and seconds > attempt.seconds:
            kill.send(process)
            due = False
        if seconds > PATIENCE_S:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.005)


def _end(work: Any) -> None:
    """Call `work` and end this process with its exit status or that of its exception."""
    status = 1
    try:
        status = work()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
