"""Values that are logged once per optimization step, and loggers that have written what they got."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning as L


@dataclass(frozen=True)
class StepLog:
    """What the loggers get at the end of an optimization step.

    Lightning gives it to them after the last hook of the step, in which a checkpoint is written: if the process is
    killed in between, the resumed run has to log it.

    Attributes:
        step: Step number in the loggers.
        values: Values by name; empty where nothing is logged.
    """

    step: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @classmethod
    def current(cls, trainer: L.Trainer) -> StepLog:
        """Return what Lightning will log of the step that has just ended."""
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
        """Log it again; loggers that have it get the same values twice."""
        for logger in trainer.loggers if self.values else ():
            logger.log_metrics(dict(self.values), self.step)
            logger.save()

    def state(self) -> tuple[int, dict[str, float]]:
        """Return the arguments of the constructor."""
        return self.step, self.values


def save_loggers(trainer: L.Trainer) -> None:
    """Let the loggers write what they have, so that it is not lost if the process is killed."""
    for logger in trainer.loggers:
        logger.save()
