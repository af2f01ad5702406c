"""Progress of long work that is not training."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Function of the number of finished items and the number of all items."""


class ProgressLine:
    """Show how much is done and the remaining time: in one line of a terminal, else a line per minute.

    Args:
        unit: What is counted, such as `images`.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.start: tuple[int, float] | None = None
        self.last = -60.0
        self.text = ""

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`; the first call is that before the first batch."""
        now = time.monotonic()
        if self.start is None:
            self.start = (done, now)
            if done:
                print(f"continuing after {done} {self.unit}", file=sys.stderr)
            return
        before, started = self.start
        remaining = (now - started) * (total - done) / max(1, done - before)
        self.text = f"{done}/{total} {self.unit}, {int(remaining) // 60}:{int(remaining) % 60:02} left"
        if sys.stderr.isatty():
            print(f"\r{self.text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - self.last >= 60:
            self.last = now
            print(self.text, file=sys.stderr, flush=True)
            self.text = ""

    def finish(self) -> None:
        """End the line of a terminal, or show the last state that was not shown."""
        if self.text:
            print(file=sys.stderr) if sys.stderr.isatty() else print(self.text, file=sys.stderr)
