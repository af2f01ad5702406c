"""Delay Ctrl-C and SIGTERM to the end of an optimization step if stopping at once would lose state."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

PATIENCE_S = 45.0


class Interruption:
    """Delay the first Ctrl-C while parameters are changed, and with several processes until all can stop together.

    With one process, Ctrl-C takes effect at once, except between `hold` and `release`: then `release` raises it. With
    several processes, Ctrl-C and SIGTERM to any process take effect in `agree`, in all processes at the same step,
    because the others would wait forever for a process that stops alone. A second signal, or `patience` seconds without
    `agree`, ends the process at once, even while it waits for another process.

    Args:
        patience: Seconds between a signal and the end of the process.

    Attributes:
        agreed: Whether all processes have agreed to stop.
    """

    def __init__(self, patience: float = PATIENCE_S) -> None:
        self.patience = patience
        self.agreed = False
        self._held = False
        self._several = False
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._deadline = Deadline(patience)

    def install(self, trainer: L.Trainer) -> None:
        """Install the signal handlers, which is possible only in the main thread."""
        self.agreed = self._held = False
        self._received = None
        self._several = trainer.world_size > 1
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM) if self._several else (signal.SIGINT,):
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, self._handle):
                self._previous[number] = before
                signal.signal(number, self._handle)
        if signal.SIGTERM in self._previous:
            # Lightning's handler would wait for the other processes at any point of the step.
            originals = trainer._signal_connector._original_handlers
            self._previous[signal.SIGTERM] = originals.get(signal.SIGTERM, signal.SIG_DFL)
        if self._several:
            self._deadline.start(tuple(self._previous))

    def uninstall(self) -> None:
        """Restore the previous handlers; with several processes, the SIGTERM handler that preceded Lightning's."""
        self._deadline.stop()
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}

    def hold(self) -> None:
        """Delay Ctrl-C from now on."""
        self._held = True

    def release(self) -> None:
        """Raise a Ctrl-C that was delayed, unless the processes have to agree first."""
        self._held = False
        if self._received is not None and not self._several:
            self._raise(self._received)

    def request(self, number: int) -> None:
        """Let `synchronize` raise as after this signal, without a limit on the time until then.

        Args:
            number: The signal, `SIGINT` or `SIGTERM`.
        """
        self._received = self._received or number

    def synchronize(self, trainer: L.Trainer) -> None:
        """Raise in all processes if any of them received a signal; all must call it at the same step."""
        if not self._several:
            return
        own = torch.tensor(float(self._received or 0), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(own, reduce_op="max"))
        if number:
            self.agreed = True
            self._raise(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None or not (self._held or self._several):
            self._interrupt(number, frame)
            return
        self._received = number
        rank_zero_info("Stopping at the end of this optimization step; press Ctrl-C again to stop at once.")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        previous: Callable[[int, FrameType | None], Any] | int | None = self._previous.get(number)
        if number == signal.SIGINT and callable(previous):
            previous(number, frame)
        self._raise(number)

    def _raise(self, number: int) -> None:
        self._deadline.stop()
        self._received = None
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException


class Deadline:
    """End this process some time after a signal, unless `stop` is called before.

    This uses a thread, because a Python handler does not run while the main thread waits for another process in C++
    code.

    Args:
        seconds: Seconds between the signal and the end of the process.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._stopped = threading.Event()
        self._wakeup: int | None = None  # the interpreter writes the numbers of received signals here
        self._previous = -1

    def start(self, signals: tuple[int, ...]) -> None:
        """Start waiting for these signals; call it in the main thread."""
        self.stop()
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(reading, signals, self._stopped), daemon=True).start()

    def stop(self) -> None:
        """Stop waiting."""
        self._stopped.set()
        if self._wakeup is not None:
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(self._previous)
            os.close(self._wakeup)
            self._wakeup = None

    def _watch(self, reading: int, signals: tuple[int, ...], stopped: threading.Event) -> None:
        with os.fdopen(reading, "rb", buffering=0) as numbers:
            number = next((each[0] for each in iter(lambda: numbers.read(1), b"") if each[0] in signals), None)
        if number is None or stopped.wait(self.seconds):
            return
        name = signal.Signals(number).name
        print(
            f"the processes did not stop together within {self.seconds:g} s after {name}; exiting",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
