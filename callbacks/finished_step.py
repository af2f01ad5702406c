"""The position of a run after an optimization step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_draft.callbacks.logged_values import StepLog

GRADIENT_NORM = "train/gradient_norm/total"


@dataclass(frozen=True)
class FinishedStep:
    """Position of a run after an optimization step.

    Attributes:
        step: Number of finished optimization steps.
        position: State of the Trainer's loops and data loaders.
        validation_due: Whether the validation of this step has not been run yet.
        metrics: The Trainer's `callback_metrics`.
        loss: The loss of the step's last batch.
        log: Values of this step that the loggers receive.
        callbacks: States of the callbacks before the validation of this step, while that is due.
    """

    step: int
    position: dict[str, Any]
    validation_due: bool
    metrics: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    log: StepLog = field(default_factory=StepLog)
    callbacks: dict[str, Any] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The epoch of the step."""
        return int(self.position["epoch_progress"]["current"]["completed"])

    @property
    def is_finite(self) -> bool:
        """Whether the loss of the step and, if it is measured, the norm of its gradient are finite."""
        return all(
            math.isfinite(float(value)) for value in (self.loss, self.metrics.get(GRADIENT_NORM)) if value is not None
        )
