"""Gradient norms: of the parameters, and along the denoising chain; and what to do when they explode.

References:
    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400, section 3 (the
    gradient grows with every step that it is propagated through).
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_draft.callbacks.gradient_profile import StepGradients, log_figure
from lightning_draft.errors import ConfigurationError
from lightning_draft.parameter_gradients import (
    drop_gradients,
    gradient_norm,
    multiply_gradient,
    parameters_with_gradients,
)

Action = Literal["warn", "skip", "clip", "stop"]


class GradientNormMonitor(Callback):
    """Log the gradient's norm, overall and at every denoising step, and act when it explodes.

    `gradient_norm/total` is the norm over the trainable parameters before clipping; `gradient_norm/step_<i>` is the
    norm of the gradient that arrives at the latent which step `i` of the chain (0 is the first) hands on, over the
    whole batch: the explosion profile. A norm explodes when it exceeds `factor` times the median of the last `window`
    finite norms. The action is then

    - `warn`: say so, and let the step happen;
    - `skip`: drop the gradients, so that the optimiser changes neither parameters nor momenta;
    - `clip`: scale the gradient down to `factor` times the median;
    - `stop`: skip the step and end training.

    A norm that is not finite is skipped whatever the action, and ends training under `stop` or when it happens
    `max_nonfinite` times in a row; under a gradient scaler (fp16), whose search for a scale makes such norms, only the
    latter ends training. All processes decide the same. DeepSpeed's optimiser passes over no step: what would be
    skipped becomes a gradient of 0 there, which still moves parameters by momentum and decay. Actions are counted in
    `counts`, and logged as `gradient_norm/warned`, `skipped`, `clipped`, `stopped` and `nonfinite` from the first on.

    Args:
        action: What to do about an explosion.
        factor: How many times the median is an explosion; above 1.
        window: How many norms the median looks back.
        min_history: How many norms there must be before one can explode.
        every_n_steps: Optimisation steps between logged scalars; by default the Trainer's `log_every_n_steps`.
        figure_every_n_steps: Optimisation steps between figures of the profile; 0 draws none.
        max_nonfinite: End training after this many norms in a row that are not finite.
    """

    def __init__(
        self,
        action: Action = "warn",
        factor: float = 10.0,
        window: int = 50,
        min_history: int = 10,
        every_n_steps: int | None = None,
        figure_every_n_steps: int = 100,
        max_nonfinite: int = 20,
    ) -> None:
        if action not in ("warn", "skip", "clip", "stop"):
            raise ConfigurationError(f"action={action!r} is not known; write warn, skip, clip or stop")
        if factor <= 1:
            raise ConfigurationError(f"factor={factor} must exceed 1; 10 is ten times the median norm")
        if not 1 <= min_history <= window:
            raise ConfigurationError(f"min_history={min_history} must lie in 1..window={window}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps} must be at least 1")
        if figure_every_n_steps < 0 or max_nonfinite < 1:
            raise ConfigurationError("figure_every_n_steps must not be negative, and max_nonfinite at least 1")
        self.action = action
        self.factor = factor
        self.min_history = min_history
        self.every_n_steps = every_n_steps
        self.figure_every_n_steps = figure_every_n_steps
        self.max_nonfinite = max_nonfinite
        self.history: deque[float] = deque(maxlen=window)
        self.counts = dict.fromkeys((*_DONE.values(), "nonfinite"), 0)
        self._nonfinite_in_a_row = 0
        self._steps = StepGradients()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the latents of the module's chains, if it shows them."""
        probes = getattr(pl_module, "probes", None)
        if probes is not None and self._steps not in probes:
            probes.append(self._steps)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop watching."""
        self._detach(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._detach(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Watch the chain's gradients where this optimisation step's are logged."""
        self._steps.active = self._logs_at(trainer) or self._draws_at(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure, act, log: after unscaling and accumulation, before the Trainer clips."""
        parameters = parameters_with_gradients(trainer, pl_module, optimizer)
        profile = self._steps.collect(trainer, pl_module.device)
        self._steps.active = False
        if not parameters:
            return
        norm = gradient_norm(parameters, trainer)
        taken = self._act(trainer, parameters, norm)
        trainer.callback_metrics["gradient_norm/total"] = torch.tensor(norm)
        if taken or self._logs_at(trainer):
            self._log(trainer, norm, profile)
        if profile and self._draws_at(trainer) and trainer.is_global_zero:
            for logger in trainer.loggers:
                log_figure(logger, "gradient_norm/profile", profile, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The norms that the median looks at, and the counts."""
        return {
            "history": list(self.history),
            "counts": dict(self.counts),
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a run left off."""
        self.history.extend(state_dict["history"])
        self.counts.update(state_dict["counts"])
        self._nonfinite_in_a_row = state_dict["nonfinite_in_a_row"]

    @property
    def threshold(self) -> float:
        """The norm above which a gradient counts as exploded; infinite while there is too little history."""
        return self.factor * median(self.history) if len(self.history) >= self.min_history else math.inf

    def _act(self, trainer: L.Trainer, parameters: list[nn.Parameter], norm: float) -> bool:
        """Whether anything was out of order."""
        if not math.isfinite(norm):
            self._handle_nonfinite(trainer, parameters)
            return True
        self._nonfinite_in_a_row = 0
        threshold = self.threshold
        # Exploded norms enter the history too: if the scale has changed for good, the median follows.
        self.history.append(norm)
        if norm <= threshold:
            return False
        self.counts[_DONE[self.action]] += 1
        message = f"gradient norm {norm:.3g} at step {trainer.global_step} exceeds {threshold:.3g}"
        if self.action == "clip":
            for parameter in parameters:
                multiply_gradient(parameter, threshold / norm)
        elif self.action != "warn":
            drop_gradients(parameters)
        trainer.should_stop |= self.action == "stop"
        rank_zero_warn(f"{message} ({self.factor:g} times the running median): {_MESSAGES[self.action]}")
        return True

    def _handle_nonfinite(self, trainer: L.Trainer, parameters: list[nn.Parameter]) -> None:
        self.counts["nonfinite"] += 1
        self.counts["skipped"] += 1
        self._nonfinite_in_a_row += 1
        drop_gradients(parameters)
        stop = self.action == "stop" and _scaler(trainer) is None
        if stop or self._nonfinite_in_a_row >= self.max_nonfinite:
            self.counts["stopped"] += 1
            trainer.should_stop = True
        rank_zero_warn(
            f"the gradient is not finite at step {trainer.global_step} ({self._nonfinite_in_a_row} in a row): "
            + _MESSAGES["stop" if trainer.should_stop else "skip"]
        )

    def _log(self, trainer: L.Trainer, norm: float, profile: dict[int, float]) -> None:
        metrics = {"gradient_norm/total": norm}
        metrics |= {f"gradient_norm/step_{step}": value for step, value in profile.items()}
        metrics |= {f"gradient_norm/{name}": float(count) for name, count in self.counts.items() if count}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _logs_at(self, trainer: L.Trainer) -> bool:
        every = self.every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        return trainer.global_step % every == 0

    def _draws_at(self, trainer: L.Trainer) -> bool:
        return self.figure_every_n_steps > 0 and trainer.global_step % self.figure_every_n_steps == 0

    def _detach(self, pl_module: L.LightningModule) -> None:
        probes = getattr(pl_module, "probes", [])
        if self._steps in probes:
            probes.remove(self._steps)


_DONE = {"warn": "warned", "skip": "skipped", "clip": "clipped", "stop": "stopped"}
_MESSAGES = {
    "warn": "the step happens all the same; action=skip or clip would prevent it",
    "skip": "the step is skipped",
    "clip": "clipped to that",
    "stop": "training stops; lower the learning rate or the number of steps with gradient, or choose action=skip",
}


def _scaler(trainer: L.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
