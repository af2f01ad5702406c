"""Log the values of each optimization step once, and flush the loggers."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning as L


@dataclass(frozen=True)
class StepLog:
    """The values that are logged at the end of an optimization step.

    Lightning logs them after the last hook of the step, in which a checkpoint is written. If the process is killed in
    between, the resumed run must log them.

    Attributes:
        step: Step number in the loggers.
        values: Values by name; empty if nothing is logged.
    """

    step: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @classmethod
    def current(cls, trainer: L.Trainer) -> StepLog:
        """Return the values that Lightning will log for the step that has just ended."""
        connector = trainer._logger_connector
        if not connector.should_update_logs:
            return cls()
        values = {name: float(value) for name, value in connector.metrics["log"].items()}
        step = values.pop("step", None)
        if step is None:
            values.setdefault("epoch", float(trainer.current_epoch))
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
        return cls(int(step), values)

    def repeat(self, trainer: L.Trainer) -> None:
        """Log the values again; a logger that already has them receives the same values again."""
        for logger in trainer.loggers if self.values else ():
            logger.log_metrics(dict(self.values), self.step)
            logger.save()

    def state(self) -> tuple[int, dict[str, float]]:
        """Return the arguments of the constructor."""
        return self.step, self.values


def save_loggers(trainer: L.Trainer) -> None:
    """Flush the loggers, so that no values are lost if the process is killed."""
    for logger in trainer.loggers:
        logger.save()
