"""Build the optimizer and its learning-rate schedule from the user's callables."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau

from lightning_draft.arguments import positive
from lightning_draft.errors import ConfigurationError


def build_optimizer(make: OptimizerCallable, parameters: Iterable[nn.Parameter], lr: float | None) -> Optimizer:
    """Return the optimizer of the parameters.

    Args:
        make: Called with the parameters.
        parameters: The trainable parameters.
        lr: Learning rate that replaces the optimizer's, if given.

    Raises:
        ConfigurationError: The optimizer rejects its options, its learning rate is not positive, or it needs the loss
            more than once per step.
    """
    try:
        optimizer = make(parameters)
    except ValueError as error:
        raise ConfigurationError(
            f"the optimizer rejects its options: {error}; change that option, or leave it out for torch's default"
        ) from error
    if isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates the loss several times per step, each time with new noise, and is not supported; use "
            "another optimizer, "
            "such as torch.optim.AdamW"
        )
    for group in optimizer.param_groups:
        if lr is not None:
            group["lr"] = lr
        positive("optimizer.lr", float(group["lr"]), hint="write for example 1e-4")
    return optimizer


def scheduler_config(make: LRSchedulerCallable, optimizer: Optimizer, validates: bool) -> dict[str, Any]:
    """Return Lightning's description of a learning-rate schedule.

    A schedule steps once per optimizer step. `ReduceLROnPlateau` is stepped by `RewardModule.on_validation_end` after
    each validation; the interval for Lightning is so long that Lightning never steps it.

    Args:
        make: Called with the optimizer.
        optimizer: The optimizer.
        validates: Whether the Trainer validates.

    Raises:
        ConfigurationError: A `ReduceLROnPlateau` has no metric to monitor, or there is no validation.
    """
    scheduler = make(optimizer)
    if not isinstance(scheduler, TorchReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    if not isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            "torch's ReduceLROnPlateau does not say which metric it monitors; use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/reward and mode: max"
        )
    if not validates:
        raise ConfigurationError(
            "ReduceLROnPlateau steps after each validation, and this run has none; set the Trainer's "
            "limit_val_batches above 0 and give validation prompts, or use another schedule"
        )
    never = {"interval": "epoch", "frequency": sys.maxsize}
    return {"scheduler": scheduler, "monitor": scheduler.monitor, **never}


def step_on_plateau(configs: Iterable[LRSchedulerConfig], metrics: Mapping[str, Tensor]) -> None:
    """Step each `ReduceLROnPlateau` with the metric that it monitors.

    Args:
        configs: The Trainer's schedules.
        metrics: Logged values by key.

    Raises:
        ConfigurationError: The metric was not logged.
    """
    for config in configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        if config.scheduler.monitor not in metrics:
            raise ConfigurationError(
                f"ReduceLROnPlateau monitors {config.scheduler.monitor!r}, which is not logged; write one of "
                f"{', '.join(sorted(metrics))}"
            )
        config.scheduler.step(float(metrics[config.scheduler.monitor]))
