"""Points at which a training process can be killed, and ways to kill it: signals and a full disk.

All hooks are installed after the fork in the process that will be killed; the package does not contain them.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_draft.cli.app import DraftCLI
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models.pipeline import PipelineModel

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice")
HOOKS = (
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)
FILES = (".ckpt", ".safetensors", ".png", ".yaml")
MOMENTS = (
    "time",
    "network",
    "optimizer",
    "rollout",
    *HOOKS,
    *(f"{call} {suffix}" for call in ("write", "replace") for suffix in FILES),
)
_OFTEN = {
    "network": 40,
    "optimizer": 5,
    "on_train_batch_start": 5,
    "on_before_backward": 5,
    "on_before_optimizer_step": 5,
    "on_before_zero_grad": 5,
    "on_train_batch_end": 5,
    "on_validation_start": 2,
    "on_validation_batch_start": 4,
    "on_validation_end": 2,
}  # largest occurrence at which a run is killed; for other points, the first
_SECOND_SIGNAL_S = 0.03


@dataclass(frozen=True)
class Kill:
    """How and when to kill a process.

    Args:
        how: One of `SIGNALS`, `disk full`, or `file limit`.
        moment: One of `MOMENTS`.
        number: Occurrence of the moment, from 1; for `file limit` the limit in KiB.
        delay: Seconds between two signals.
        place: Relative position among the run's callbacks, from 0 to 1, of the callback that sends a signal in a hook.
        other_tmpdir: Whether `TMPDIR` is on another file system.
    """

    how: str
    moment: str
    number: int
    delay: float = 0.0
    place: float = 0.0
    other_tmpdir: bool = False

    def __str__(self) -> str:
        where = " with TMPDIR on another file system" if self.other_tmpdir else ""
        return f"{self.how} at {self.moment} {self.number}{where}"

    def install(self) -> None:
        """Install the kill in this process; the parent handles `time`."""
        if self.how == "file limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.number * 1024, resource.RLIM_INFINITY))
        elif self.moment != "time":
            _install(self, _Countdown(self.number, self._strike))

    def _strike(self, file: Path | None = None) -> None:
        if self.how == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.how == "SIGKILL" and file is not None:
            os.truncate(file, file.stat().st_size // 2)
        self.send(os.getpid())

    def send(self, process: int) -> None:
        """Send the signals to a process."""
        name = self.how.removesuffix(" twice")
        number = signal.Signals[name]
        if name != self.how:
            second = threading.Timer(self.delay, _kill, (process, number))
            second.daemon = True
            second.start()
        _kill(process, number)


def choose(generator: random.Random, how: str, first: bool, rollouts: bool) -> Kill:
    """Choose how and when to kill at random.

    Args:
        generator: Random numbers.
        how: See `Kill`.
        first: Whether the run has not been killed before.
        rollouts: Whether the method collects rollouts.
    """
    if how == "file limit":
        return Kill(how, "write", generator.randint(2, 36))
    writes = [moment for moment in MOMENTS if moment.startswith("write")]
    possible = [moment for moment in MOMENTS if (first or ".yaml" not in moment) and (rollouts or moment != "rollout")]
    moment = generator.choice([each for each in possible if each in writes or how != "disk full"])
    most = _OFTEN.get(moment, {".ckpt": 3, ".safetensors": 6, ".png": 6}.get(moment.partition(" ")[2], 1))
    return Kill(
        how,
        moment,
        generator.randint(1, most),
        delay=generator.uniform(0.0, _SECOND_SIGNAL_S),
        place=generator.random(),
        other_tmpdir=moment.startswith(("write", "replace")) and generator.random() < 0.5,
    )


class _Countdown:
    """Call a function at the `number`-th call, and for a full disk also at every later call."""

    def __init__(self, number: int, act: Callable[..., None]) -> None:
        self.left = number
        self.act = act

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act(*args)


def _install(kill: Kill, countdown: _Countdown) -> None:
    name, _, suffix = kill.moment.partition(" ")
    if name in HOOKS:
        _add_callback(kill, countdown)
    elif name == "network":
        _before(PipelineModel, "denoise", countdown)
    elif name == "rollout":
        _before(PolicyGradientModule, "score_samples", countdown)
    elif name == "optimizer":
        _before(torch.optim.AdamW, "step", countdown)
    elif name == "write":
        _before_writing(suffix, countdown)
    else:
        _before_replacing(suffix, countdown)


def _before(owner: type, name: str, act: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _before_writing(suffix: str, act: Callable[[Path], None]) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        """Act before a file with the suffix is written to the disk."""
        file = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if file.suffix == suffix:
            act(file)
        original(handle)

    os.fsync = fsync


def _before_replacing(suffix: str, act: Callable[[], None]) -> None:
    original = os.replace

    def replace(source: Any, target: Any, **options: Any) -> None:
        if Path(target).suffix == suffix:
            act()
        original(source, target, **options)

    os.replace = replace


def _add_callback(kill: Kill, countdown: _Countdown) -> None:
    original: Any = DraftCLI._callbacks

    def callbacks(self: DraftCLI, config: Any) -> list[Callback]:
        """Return the callbacks of the run, and one that counts down at the moment of the kill."""
        found: list[Callback] = original(self, config)
        extra = Callback()
        setattr(extra, kill.moment, lambda *_: countdown())
        found.insert(round(kill.place * len(found)), extra)
        return found

    DraftCLI._callbacks = callbacks  # type: ignore[method-assign]


def _kill(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
