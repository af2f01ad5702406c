"""The norm of the gradient at each step of the sampling chain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_draft.callbacks.image_grid import log_image
from lightning_draft.parameter_gradients import gradient_scaler


class StepGradients:
    """Measure the norm of the gradient of the loss with respect to every latent.

    Norms of the same step (copies, accumulated batches, processes) are combined as the root of the sum of squares. The
    gradients of several processes are averaged, so that the norm refers to the loss over the global batch.

    Attributes:
        active: Whether gradients are measured.
    """

    def __init__(self) -> None:
        self.active = False
        self._squares: defaultdict[int, list[Tensor]] = defaultdict(list)

    def __call__(self, step: int, latent: Tensor) -> None:
        """Register a hook that measures the gradient of `latent`, the result of step `step`."""
        if self.active:
            latent.register_hook(lambda gradient: self._measure(step, gradient))  # type: ignore[no-untyped-call]

    def collect(self, trainer: L.Trainer, device: torch.device) -> dict[int, float]:
        """Return the norms by step since the last call, divided by the gradient scaler's factor, and reset them."""
        squares, self._squares = self._squares, defaultdict(list)
        if not self.active:
            return {}
        totals = {step: float(torch.stack(parts).sum()) for step, parts in squares.items()}
        if trainer.world_size > 1:
            totals = _sum_over_processes(totals, trainer, device)
        scaler = gradient_scaler(trainer)
        scale = (scaler.get_scale() if scaler is not None else 1.0) * trainer.world_size
        return {step: math.sqrt(total) / scale for step, total in sorted(totals.items())}

    def _measure(self, step: int, gradient: Tensor) -> None:
        self._squares[step].append(gradient.detach().float().square().sum())


def profile_figure(profile: Mapping[int, float], step: int) -> Any:
    """Return a matplotlib figure of the profile over the steps of the chain, on a logarithmic axis unless all are 0."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(profile), list(profile.values()), marker="o")
    axes.set(
        yscale="log" if any(value > 0 for value in profile.values()) else "linear",
        xlabel="sampling step (0 is the first)",
        ylabel="gradient norm of the latent",
        title=f"optimizer step {step}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure


def log_figure(logger: Logger, key: str, profile: Mapping[int, float], step: int) -> None:
    """Log the profile to TensorBoard as a figure, and to other loggers as an image."""
    experiment: Any = getattr(logger, "experiment", None)
    figure = profile_figure(profile, step)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(key, figure, step)
    else:
        log_image(logger, key, _render(figure), step)


def _render(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _sum_over_processes(totals: dict[int, float], trainer: L.Trainer, device: torch.device) -> dict[int, float]:
    last = torch.tensor(float(max(totals, default=-1)), device=device)
    length = int(trainer.strategy.reduce(last, reduce_op="max")) + 1
    sums = torch.zeros(length, device=device)
    for step, total in totals.items():
        sums[step] = total
    sums = trainer.strategy.reduce(sums, reduce_op="sum")
    return {step: float(total) for step, total in enumerate(sums) if total > 0}
