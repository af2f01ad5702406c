"""Delay Ctrl-C and SIGTERM to the end of an optimization step if stopping at once would lose state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

_PATIENCE = 45.0  # seconds


class Interruption:
    """Delay the first Ctrl-C while parameters are changed, and with several processes until all can stop together.

    With one process, Ctrl-C takes effect at once, except between `hold` and `release`: then `release` raises it. With
    several processes, Ctrl-C and SIGTERM to any process take effect in `agree`, in all processes at the same step,
    because the others would wait forever for a process that stops alone. A second signal, or 45 seconds without
    `agree`, ends the process at once.

    Attributes:
        agreed: Whether all processes have agreed to stop.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._held = False
        self._several = False
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

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

    def uninstall(self) -> None:
        """Restore the previous handlers."""
        self._cancel()
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

    def agree(self, trainer: L.Trainer) -> None:
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
            self._cancel()
            self._interrupt(number, frame)
            return
        self._received = number
        rank_zero_info("Stopping at the end of this optimization step; press Ctrl-C again to stop at once.")
        if self._several:
            self._timer = threading.Timer(_PATIENCE, signal.raise_signal, [number])
            self._timer.daemon = True
            self._timer.start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        previous: Callable[[int, FrameType | None], Any] | int | None = self._previous.get(number)
        if number == signal.SIGINT and callable(previous):
            previous(number, frame)
        self._raise(number)

    def _raise(self, number: int) -> None:
        self._cancel()
        self._received = None
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
