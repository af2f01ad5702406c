"""Helpers of the callbacks: the run's folder, fixed prompts and noise, and evaluation without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lightning_draft.callbacks.random_state import get_random_state, set_random_state
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.rewards.samples import Samples


def run_folder(trainer: L.Trainer, dirpath: str | None, name: str) -> Path:
    """Return the folder that a callback writes to.

    Args:
        trainer: The trainer.
        dirpath: The folder that the user gave, if any.
        name: Name of the folder within the run's folder if `dirpath` is not given.
    """
    return (
        Path(dirpath).expanduser() if dirpath is not None else Path(trainer.log_dir or trainer.default_root_dir) / name
    )


def reward_module(pl_module: L.LightningModule, callback: object) -> RewardModule:
    """Return the module if it is a `RewardModule`.

    Raises:
        ConfigurationError: The module is of another class.
    """
    if not isinstance(pl_module, RewardModule):
        raise ConfigurationError(
            f"{type(callback).__name__} works with subclasses of RewardModule, and the Trainer was given a "
            f"{type(pl_module).__name__}; leave the callback out"
        )
    return pl_module


def fixed_prompts(trainer: L.Trainer, prompts: list[str] | None, maximum: int, callback: object) -> list[str]:
    """Return the prompts that a callback samples: `prompts`, or the data module's validation prompts.

    Raises:
        ConfigurationError: There are no prompts.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if prompts is None:
        prompts = list(data.val_prompts) if isinstance(data, PromptDataModule) else []
    if not prompts:
        raise ConfigurationError(
            f"{type(callback).__name__} has no prompts, because the data module has no validation prompts; "
            "set prompts=['a cat', 'a dog'], or val_size=8 of the data module"
        )
    return prompts[:maximum]


@dataclass(frozen=True)
class FixedSamples:
    """Prompts and the seed of their noise, which give the same images whenever the parameters are the same.

    Args:
        prompts: `N` prompts.
        seed: Seed of the starting noise and of a stochastic sampler's noise.
        batch_size: Number of images generated at a time; by default all.
    """

    prompts: list[str]
    seed: int
    batch_size: int | None = None

    def generate(self, module: RewardModule) -> Samples:
        """Generate `N` latents and images, on the CPU."""
        noise = module.model.noise(len(self.prompts), torch.Generator().manual_seed(self.seed))
        parts = [
            module.generate(self.prompts[some], noise=noise[some], seed=self.seed + some.start)
            for some in self._batches()
        ]
        return Samples.concatenate(parts)

    def score(self, module: RewardModule, samples: Samples) -> dict[str, Tensor]:
        """Compute the scores `(N,)` of `N` samples by name, on the CPU."""
        scores = [module.score(samples[some].to(module.device), self.prompts[some]) for some in self._batches()]
        return {name: torch.cat([each[name] for each in scores]).float().cpu() for name in scores[0]}

    def _batches(self) -> list[slice]:
        size = self.batch_size or len(self.prompts)
        return [slice(start, start + size) for start in range(0, len(self.prompts), size)]


@contextmanager
def observing(pl_module: L.LightningModule) -> Iterator[None]:
    """Within this context, run the module without a graph and in eval mode.

    Afterwards the random states and the mode of every submodule are restored.
    """
    state = get_random_state()
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        set_random_state(state)


@contextmanager
def sampling(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Within this context, generate and score images in the precision of the run and without side effects."""
    with observing(pl_module), trainer.precision_plugin.forward_context():
        yield
