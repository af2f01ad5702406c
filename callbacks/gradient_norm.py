"""Gradient norms of the parameters and along the sampling chain, and the action when they explode.

References:
    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400, section 3 (the
    gradient grows with every step that it is propagated through).
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_draft.arguments import in_range, integer, integer_at_least, is_finite, one_of
from lightning_draft.callbacks.common import reward_module
from lightning_draft.callbacks.gradient_profile import StepGradients, log_figure
from lightning_draft.callbacks.step_state import StepState
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.parameter_gradients import (
    drop_gradients,
    gradient_norm,
    gradient_scaler,
    multiply_gradient,
    parameters_with_gradients,
)

Action = Literal["warn", "skip", "clip", "stop"]


class GradientNormMonitor(StepState):
    """Log the norm of the gradient, in total and at every sampling step, and act if it explodes.

    `train/gradient_norm/total` is the norm over the trainable parameters before clipping;
    `train/gradient_norm/step_<i>` is the norm of the gradient with respect to the latent that step `i` of the chain (0
    is the first) returns, over the whole batch; if more than one step has a gradient, they are plotted too. A norm
    explodes if it exceeds `factor` times the median of the last `window` finite norms. The action is then

    - `warn`: warn, and take the step;
    - `skip`: drop the gradients, so that the optimizer changes neither parameters nor momenta;
    - `clip`: scale the gradient down to `factor` times the median;
    - `stop`: skip the step and end training with an error.

    A step whose norm is not finite is skipped by the module with every action, and ends training if it happens too
    often in a row. With the action `stop`, training ends at the first one, except under fp16, where the gradient scaler
    causes such norms while it adjusts its scale. Training ends with a `DivergenceError`; the files that
    `LastCheckpoint` and `LoRAExport` have written before remain unchanged. Actions are counted in `counts`, and logged
    as `train/gradient_norm/warned`, `skipped`, `clipped`, `stopped` and `nonfinite` once they are not 0.

    Note:
        All processes take the same action. DeepSpeed's optimizer cannot skip a step: the gradient is set to 0 instead,
        and momentum and weight decay still change the parameters.

    Example:
        ```python
        trainer = Trainer(max_steps=1000, callbacks=[GradientNormMonitor("skip", factor=5)])
        ```

    Args:
        action: What to do if the norm explodes.
        factor: Factor of the median above which a norm explodes, greater than 1.
        window: Number of norms in the median.
        min_history: Number of norms that are needed for the median, at most `window`.
        every_n_steps: Optimization steps between logged scalars; by default the Trainer's `log_every_n_steps`.
        figure_every_n_steps: Optimization steps between figures of the gradient profile; 0 for no figures.
        max_nonfinite: End training after this many norms in a row that are not finite, by setting the module's
            `nonfinite_gradients.limit`; by default that is left as it is (10).

    Attributes:
        history: The norms in the median.
        counts: Number of actions: `warned`, `skipped`, `clipped`, `stopped`, `nonfinite`.
    """

    def __init__(
        self,
        action: Action = "warn",
        factor: float = 10.0,
        window: int = 50,
        min_history: int = 10,
        every_n_steps: int | None = None,
        figure_every_n_steps: int = 100,
        max_nonfinite: int | None = None,
    ) -> None:
        super().__init__()
        if not is_finite(factor) or factor <= 1:
            raise ConfigurationError(f"GradientNormMonitor: factor={factor!r} must be greater than 1; write 10")
        self.action = cast(Action, one_of("GradientNormMonitor: action", action, get_args(Action)))
        self.factor = factor
        integer_at_least("GradientNormMonitor: window", window, 1)
        self.min_history = in_range(
            "GradientNormMonitor: min_history", integer("GradientNormMonitor: min_history", min_history), 1, window
        )
        self.every_n_steps = (
            None if every_n_steps is None else integer_at_least("GradientNormMonitor: every_n_steps", every_n_steps, 1)
        )
        self.figure_every_n_steps = integer_at_least(
            "GradientNormMonitor: figure_every_n_steps", figure_every_n_steps, 0
        )
        self.max_nonfinite = (
            None if max_nonfinite is None else integer_at_least("GradientNormMonitor: max_nonfinite", max_nonfinite, 1)
        )
        self.history: deque[float] = deque(maxlen=window)
        self.counts = dict.fromkeys((*_DONE.values(), "nonfinite"), 0)
        self._steps = StepGradients()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the gradients of the latents that are part of the module's graph, and set the module's limit."""
        module = reward_module(pl_module, self)
        if self._steps not in module.probes:
            module.probes.append(self._steps)
        if self.max_nonfinite is not None:
            module.nonfinite_gradients.limit = self.max_nonfinite

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop measuring."""
        self._detach(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop measuring."""
        self._detach(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure the gradients along the chain if those of this optimization step are logged."""
        super().on_train_batch_start(trainer, pl_module)
        self._steps.active = self._logs_at(trainer) or self._plots_at(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure the norm, act and log, after unscaling and accumulation and before the Trainer's clipping."""
        parameters = parameters_with_gradients(trainer, pl_module, optimizer)
        profile = self._steps.collect(trainer, pl_module.device)
        self._steps.active = False
        if not parameters:
            return
        norm = gradient_norm(parameters, trainer)
        taken = self._act(trainer, parameters, norm)
        trainer.callback_metrics["train/gradient_norm/total"] = torch.tensor(norm)
        if taken is not None or not math.isfinite(norm) or self._logs_at(trainer):
            self._log(trainer, norm, profile)
        if len(profile) > 1 and self._plots_at(trainer) and trainer.is_global_zero:
            for logger in trainer.loggers:
                log_figure(logger, "train/gradient_norm/profile", profile, trainer.global_step)
        if taken is not None:
            _report(trainer, taken)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms in the median, and the counts."""
        return {"history": list(self.history), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved run."""
        self.history.clear()
        self.history.extend(state_dict["history"])
        self.counts.update(state_dict["counts"])

    @property
    def threshold(self) -> float:
        """Return the norm above which a gradient explodes; infinite while there are too few norms."""
        return self.factor * median(self.history) if len(self.history) >= self.min_history else math.inf

    def _act(self, trainer: L.Trainer, parameters: list[nn.Parameter], norm: float) -> tuple[Action, str] | None:
        """Act on an exploded or non-finite norm; return the action and its reason."""
        if not math.isfinite(norm):
            return self._count_nonfinite(trainer)
        threshold = self.threshold
        # Exploded norms are added to the history too, so that the median adapts to a permanent change of scale.
        self.history.append(norm)
        if norm <= threshold:
            return None
        self.counts[_DONE[self.action]] += 1
        if self.action == "clip":
            for parameter in parameters:
                multiply_gradient(parameter, threshold / norm)
        elif self.action != "warn":
            drop_gradients(parameters)
        return self.action, (
            f"gradient norm {norm:.3g} at step {trainer.global_step} exceeds {threshold:.3g} "
            f"({self.factor:g} times the running median)"
        )

    def _count_nonfinite(self, trainer: L.Trainer) -> tuple[Action, str] | None:
        """Count a step that the module will skip; return the action `stop` if it is to end training."""
        self.counts["nonfinite"] += 1
        self.counts["skipped"] += 1
        if self.action != "stop" or gradient_scaler(trainer) is not None:
            return None
        self.counts["stopped"] += 1
        return "stop", f"the gradient is not finite at step {trainer.global_step}"

    def _log(self, trainer: L.Trainer, norm: float, profile: dict[int, float]) -> None:
        metrics = {"train/gradient_norm/total": norm}
        metrics |= {f"train/gradient_norm/step_{step}": value for step, value in profile.items()}
        metrics |= {f"train/gradient_norm/{name}": float(count) for name, count in self.counts.items() if count}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _logs_at(self, trainer: L.Trainer) -> bool:
        every = self.every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        return trainer.global_step % every == 0

    def _plots_at(self, trainer: L.Trainer) -> bool:
        return self.figure_every_n_steps > 0 and trainer.global_step % self.figure_every_n_steps == 0

    def _detach(self, pl_module: L.LightningModule) -> None:
        probes = reward_module(pl_module, self).probes
        if self._steps in probes:
            probes.remove(self._steps)


_DONE = {"warn": "warned", "skip": "skipped", "clip": "clipped", "stop": "stopped"}
_MESSAGES = {
    "warn": "the optimizer step is made anyway; set action to skip or clip to prevent it",
    "skip": "the step is skipped",
    "clip": "the gradient is clipped to it",
    "stop": (
        "training stops, and the last checkpoint is kept; lower the learning rate or the number of steps with "
        "gradient, or set action to skip"
    ),
}


def _report(trainer: L.Trainer, taken: tuple[Action, str]) -> None:
    """Warn about an action, or end training.

    Raises:
        DivergenceError: The action is `stop`.
    """
    action, reason = taken
    if action == "stop":
        raise DivergenceError(f"{reason}: {_MESSAGES[action]}")
    rank_zero_warn(f"{reason}: {_MESSAGES[action]}")
