"""Gradients that are not finite: they are dropped before they reach the parameters."""

import math

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_draft.errors import DivergenceError
from lightning_draft.parameter_gradients import (
    drop_gradients,
    gradient_norm,
    gradient_scaler,
    parameters_with_gradients,
)

_SCALER_SEARCH = 40  # number of steps in which a gradient scaler finds a scale without overflow


class NonFiniteGradients:
    """Drop gradients that are NaN or infinite, so that the optimizer changes nothing in that step.

    All processes make the same decision. Finite gradients are not changed.

    Attributes:
        limit: Number of consecutive non-finite gradients that ends training with an error.
        total: Number of non-finite gradients.
        in_a_row: Number of non-finite gradients since the last finite one.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def handle(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients before the optimizer's step, and drop them if they are not finite.

        Raises:
            DivergenceError: There were `limit` non-finite gradients in a row.
        """
        parameters = parameters_with_gradients(trainer, module, optimizer)
        if not parameters or math.isfinite(gradient_norm(parameters, trainer)):
            self.in_a_row = 0
            return
        drop_gradients(parameters)
        self.total += 1
        self.in_a_row += 1
        limit = self.limit if gradient_scaler(trainer) is None else self.limit + _SCALER_SEARCH
        if self.in_a_row >= limit:
            raise DivergenceError(
                f"the gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step "
                f"{trainer.global_step}, which changed no parameter; lower the learning rate or the number of steps "
                "with gradient, or look for NaN in the reward"
            )
        rank_zero_warn(
            f"the gradient is not finite at step {trainer.global_step}, so the step changes nothing ({self.in_a_row} "
            f"in a row, {self.total} in all)"
        )
