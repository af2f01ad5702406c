"""A progress bar with the reward, the seconds per step and the time left."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_draft.arguments import integer_at_least
from lightning_draft.text import one_line


class ProgressBar(TQDMProgressBar):
    """Show one bar over all optimization steps, with the reward, the seconds per step and the time left.

    If the output is not a terminal, lines are printed instead. The seconds per step are averaged over the last 20
    steps, without validation and sampling; the time left includes both.

    Example:
        ```python
        trainer = Trainer(max_steps=1000, callbacks=[ProgressBar(every_n_steps=50)])
        ```

    Args:
        refresh_rate: Optimization steps between updates of the bar; 0 disables it.
        every_n_steps: Optimization steps between lines if the output is not a terminal.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"

    def __init__(self, refresh_rate: int = 1, every_n_steps: int = 10) -> None:
        super().__init__(refresh_rate=integer_at_least("ProgressBar: refresh_rate", refresh_rate, 0))
        self.every_n_steps = integer_at_least("ProgressBar: every_n_steps", every_n_steps, 1)
        self._durations: deque[float] = deque(maxlen=20)
        self._total = math.inf
        self._shown = -1
        self._first_step = 0

    @property
    def is_plain(self) -> bool:
        """Whether lines are printed because the output is not a terminal."""
        return not sys.stdout.isatty()

    @property
    def is_disabled(self) -> bool:
        """Whether no bar is shown."""
        return not self.is_enabled or self.is_plain

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move this callback to the front, so that the time of a step does not include the other callbacks."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar and start the clock."""
        self._total = float(trainer.estimated_stepping_batches)
        self._first_step = self._shown = trainer.global_step
        self._durations.clear()
        self._started = time.monotonic()
        self._step_started: float | None = None
        bar = self.init_train_tqdm()
        bar.set_description("Training")
        bar.total = int(self._total) if math.isfinite(self._total) else None
        bar.n = bar.initial = trainer.global_step
        self.train_progress_bar = bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the bar across epochs."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Start a step's clock, unless gradients are being accumulated."""
        if self._step_started is None:
            self._step_started = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Show a finished optimization step."""
        step = trainer.global_step
        if step == self._shown:
            return
        self._shown = step
        self._durations.append(time.monotonic() - (self._step_started or self._started))
        self._step_started = None
        if not self.is_enabled:
            return
        if self.is_plain:
            if step % self.every_n_steps == 0 or step in (self._first_step + 1, self._total):
                print(self.line(trainer), flush=True)
        elif self._should_update(step, int(self._total) if math.isfinite(self._total) else -1):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix_str(", ".join(self.report(trainer)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the bar across epochs."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar of the validation, and print its metrics."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.sanity_checking or not self.is_enabled:
            return
        metrics = trainer.callback_metrics.items()
        values = [f"{one_line(name)} {float(value):.4g}" for name, value in metrics if name.startswith("val/")]
        self.print("  ".join([f"step {trainer.global_step}", *values]))

    def line(self, trainer: L.Trainer) -> str:
        """Return a line for output that is not a terminal."""
        total = f"/{int(self._total)}" if math.isfinite(self._total) else ""
        return "  ".join([f"step {trainer.global_step}{total}", *self.report(trainer)])

    def report(self, trainer: L.Trainer) -> list[str]:
        """Return the reward, the seconds per step and the time left, without values that are not known."""
        parts = []
        reward = trainer.callback_metrics.get("train/reward")
        if reward is not None:
            parts.append(f"reward {float(reward):.4g}")
        if self._durations:
            parts.append(f"{sum(self._durations) / len(self._durations):.3g} s/step")
        left = self.seconds_left(trainer)
        if math.isfinite(left):
            parts.append(f"{_clock(left)} left")
        return parts

    def seconds_left(self, trainer: L.Trainer) -> float:
        """Return the estimated seconds until the last step; infinite if there is no last step."""
        done = trainer.global_step - self._first_step
        if done <= 0:
            return math.inf
        return (self._total - trainer.global_step) * (time.monotonic() - self._started) / done

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar, if there is one."""
        if self.is_plain:
            print(*args, sep=sep, **{"flush": True, **kwargs})
        else:
            super().print(*args, sep=sep, **kwargs)


def _clock(seconds: float) -> str:
    """Format seconds as `h:mm:ss`, or `m:ss` below an hour."""
    return str(Tqdm.format_interval(seconds)).removeprefix("0")
