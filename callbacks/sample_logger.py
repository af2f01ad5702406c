"""Pictures of the base and the tuned model from the same prompts and noise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from lightning_draft.callbacks.ema import averaged
from lightning_draft.callbacks.pictures import comparison, log_picture
from lightning_draft.callbacks.random_state import observing
from lightning_draft.errors import ConfigurationError

_Samples = tuple[Tensor, Tensor]


class SampleLogger(Callback):
    """Sample fixed prompts from fixed noise, base beside tuned, with the reward under each picture.

    The grid goes to every logger that takes pictures, under `samples`, and to `samples/step_<n>.png` in the run's
    folder; which loggers take none is said once. The mean rewards go to every logger as `samples/reward` and
    `samples/reward_base`. Samples are drawn when training starts, every `every_n_steps` steps and when it ends.
    Training with this callback is bitwise the training without it. Every process samples, so that sharded models work;
    one writes.

    Args:
        every_n_steps: Optimisation steps between grids.
        prompts: What to sample; by default the data module's held-out prompts.
        max_samples: At most this many prompts, the first ones.
        seed: Of the starting noise and of a stochastic sampler's noise.
        min_size: Pictures smaller than this, in pixels, grow by a whole factor.
        per_row: Prompts in a row of the grid.
        batch_size: Prompts sampled at a time; by default all.
        to_files: Also write PNG files.
        dirpath: Where to; by default `samples` in the run's folder.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        prompts: list[str] | None = None,
        max_samples: int = 8,
        seed: int = 0,
        min_size: int = 128,
        per_row: int = 4,
        batch_size: int | None = None,
        to_files: bool = True,
        dirpath: str | None = None,
    ) -> None:
        numbers = {
            "every_n_steps": every_n_steps,
            "max_samples": max_samples,
            "min_size": min_size,
            "per_row": per_row,
            "batch_size": 1 if batch_size is None else batch_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ConfigurationError(f"SampleLogger: {name}={value} must be at least 1")
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.max_samples = max_samples
        self.seed = seed
        self.min_size = min_size
        self.per_row = per_row
        self.batch_size = batch_size
        self.to_files = to_files
        self.dirpath = dirpath
        self._prompts: list[str] = []
        self._base: _Samples | None = None
        self._last_step = -1
        self._told = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the prompts and the folder."""
        if stage != "fit":
            return
        self._prompts = list(_default_prompts(trainer) if self.prompts is None else self.prompts)[: self.max_samples]
        if not self._prompts:
            raise ConfigurationError(
                "SampleLogger has no prompts: the data module holds none out; give them as prompts: [...]"
            )
        run = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(run) / "samples"
        self._base = None
        self._last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample what training starts from."""
        self.sample(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Sample every `every_n_steps` optimisation steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample what training ends with."""
        self.sample(trainer, pl_module)

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, score and log the samples; nothing happens where this step's are already logged."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        with observing(pl_module), trainer.precision_plugin.forward_context():
            if self._base is None:
                with pl_module.model.base():  # type: ignore[union-attr, operator]
                    self._base = self._sample(pl_module)
            with averaged(trainer, pl_module):
                tuned = self._sample(pl_module)
        if trainer.is_global_zero:
            self._log(trainer, step, self._base, tuned)

    def _sample(self, pl_module: Any) -> _Samples:
        """Images `(N, 3, H, W)` and rewards `(N,)` of all prompts, on the CPU."""
        size = self.batch_size or len(self._prompts)
        noise = pl_module.model.noise(len(self._prompts), torch.Generator().manual_seed(self.seed))
        images, scores = [], []
        for start in range(0, len(self._prompts), size):
            prompts = self._prompts[start : start + size]
            images.append(pl_module.generate(prompts, noise=noise[start : start + size], seed=self.seed + start))
            scores.append(pl_module.score(images[-1], prompts)["reward"])
        return torch.cat(images).float().cpu(), torch.cat(scores).float().cpu()

    def _log(self, trainer: L.Trainer, step: int, base: _Samples, tuned: _Samples) -> None:
        rewards = {"samples/reward": float(tuned[1].mean()), "samples/reward_base": float(base[1].mean())}
        before, after = rewards["samples/reward_base"], rewards["samples/reward"]
        grid = comparison(
            self._prompts,
            {"base": base[0], "tuned": tuned[0]},
            {"base": base[1], "tuned": tuned[1]},
            min_size=self.min_size,
            per_row=self.per_row,
            title=f"step {step}: mean reward {before:.4g} (base), {after:.4g} (tuned)",
        )
        blind = []
        for logger in trainer.loggers:
            if not log_picture(logger, "samples", grid, step):
                blind.append(type(logger).__name__)
            logger.log_metrics(rewards, step)
        self._tell(blind, alone=len(blind) == len(trainer.loggers))
        if self.to_files:
            _write(grid, self._folder / f"step_{step:06d}.png")

    def _tell(self, blind: list[str], alone: bool) -> None:
        """Say once where the pictures do not go."""
        if self._told:
            return
        self._told = True
        if alone and not self.to_files:
            rank_zero_warn(
                "SampleLogger's pictures go nowhere: no logger takes pictures, and to_files is off; "
                "set to_files: true or use a TensorBoardLogger"
            )
        elif blind:
            place = f"they are in {self._folder}" if self.to_files else "the other loggers have them"
            rank_zero_info(f"SampleLogger: {', '.join(blind)} takes no pictures; {place}")


def _default_prompts(trainer: L.Trainer) -> list[str]:
    datamodule = getattr(trainer, "datamodule", None)
    return getattr(datamodule, "val_prompts", None) or []


def _write(picture: Image.Image, path: Path) -> None:
    """Write a PNG file so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(partial, format="PNG")
    os.replace(partial, path)
