"""A guard against over-optimisation: the trained reward climbs, and what nobody trained on falls.

References:
    Gao et al., "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760. Clark et al., arXiv:2309.17400,
    section 5.4 (reward hacking: collapse to one high-reward picture; smaller LoRA scales undo it).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.callbacks.ema import AdapterEMA, averaged, trainable
from lightning_draft.callbacks.lora_export import check_exportable, header, write
from lightning_draft.callbacks.random_state import observing
from lightning_draft.distributed import gather_full, uses_deepspeed
from lightning_draft.errors import ConfigurationError
from lightning_draft.metrics import image_drift, saturated_share, within_prompt_diversity
from lightning_draft.rewards.color import Sharpness

Action = Literal["warn", "shrink", "stop"]


@dataclass(frozen=True)
class Look:
    """What the guard sees of one state of the model, on its fixed prompts and noise.

    Attributes:
        reward: Mean trained reward.
        held_out: Mean of each held-out reward.
        drift: Root mean square difference of pixels from the base model's pictures, in [0, 1].
        diversity: Mean root mean square difference between pictures of one prompt, in [0, 1].
        sharpness: Mean Laplacian energy.
        saturated: Share of values that are 0 or below, or 1 or above.
    """

    reward: float
    held_out: dict[str, float]
    drift: float
    diversity: float
    sharpness: float
    saturated: float


class OverOptimisationGuard(Callback):
    """At each validation, look at held-out rewards on fixed prompts and noise; act when they pay for the trained one.

    A held-out reward's fall is counted from its best look, the base model included, in standard deviations of its
    scores over the base model's pictures. The model is over-optimised when some fall exceeds `margin` although the
    trained reward is higher than it was at that best look; or, where `min_diversity` is given, when the diversity
    within a prompt is below that share of the base model's and the trained reward is above the base model's. After
    `patience` such looks in a row the action is

    - `warn`: say so;
    - `shrink`: say so, and scale the adapters' update `dW` by `shrink`, from where training goes on;
    - `stop`: say so, and end training.

    Whatever the action, `guarded.safetensors`, beside the files of `LoRAExport`, holds the adapters with the greatest
    trained reward among the looks that were not over-optimised. Logged at each look under `guard/`: `reward`, each
    `held_out/<name>`, the greatest `fall`, `drift`, `diversity`, `sharpness`, `saturated`, and how often there was an
    action: `warned`, `shrunk`, `stopped`. With `warn`, training is bitwise the training without the guard.

    Args:
        action: What to do about over-optimisation.
        margin: The greatest fall of a held-out reward that is put up with, in standard deviations.
        held_out: Names under `eval_rewards` to judge by; by default all.
        min_diversity: Least share of the base model's diversity, in [0, 1]; by default it is logged only.
        patience: Over-optimised looks in a row before the action.
        shrink: Factor of `dW`, in [0, 1).
        prompts: What to sample; by default the data module's held-out prompts.
        max_prompts: At most this many prompts, the first ones.
        samples_per_prompt: Samples of each, at least 2.
        batch_size: Samples drawn at a time.
        seed: Of the starting noise and of a stochastic sampler's noise.
        dirpath: Where to write; by default `lora` in the run's folder.

    Attributes:
        counts: How often each action was taken: `warned`, `shrunk`, `stopped`.
        best_step: Optimisation steps behind the adapters that are kept; `None` before the first.
        best_reward: Their trained reward.
        looks: All looks of this run, by the number of finished optimisation steps; 0 is where it started.
    """

    def __init__(
        self,
        action: Action = "warn",
        margin: float = 0.5,
        held_out: list[str] | None = None,
        min_diversity: float | None = None,
        patience: int = 1,
        shrink: float = 0.5,
        prompts: list[str] | None = None,
        max_prompts: int = 8,
        samples_per_prompt: int = 4,
        batch_size: int = 16,
        seed: int = 0,
        dirpath: str | None = None,
    ) -> None:
        if action not in get_args(Action):
            raise ConfigurationError(f"action={action!r} is not known; write {', '.join(get_args(Action))}")
        if margin < 0 or not 0 <= shrink < 1 or not 0 <= (min_diversity or 0) <= 1:
            raise ConfigurationError("margin must not be negative, shrink lies in [0, 1) and min_diversity in [0, 1]")
        if min(patience, max_prompts, batch_size) < 1 or samples_per_prompt < 2:
            raise ConfigurationError(
                "OverOptimisationGuard: patience, max_prompts and batch_size must be at least 1, and "
                "samples_per_prompt at least 2, between which diversity is measured"
            )
        self.action = action
        self.margin = margin
        self.held_out = held_out
        self.min_diversity = min_diversity
        self.patience = patience
        self.shrink = shrink
        self.prompts = prompts
        self.max_prompts = max_prompts
        self.samples_per_prompt = samples_per_prompt
        self.batch_size = batch_size
        self.seed = seed
        self.dirpath = dirpath
        self.counts = dict.fromkeys(_DONE.values(), 0)
        self.best_step: int | None = None
        self.best_reward: float | None = None
        self.looks: dict[int, Look] = {}
        self._peaks: dict[str, tuple[float, float]] = {}
        self._strikes = 0
        self._shrink_next = False
        self._folder: Path | None = None
        self._restored_folder: Path | None = None

    @property
    def best_path(self) -> Path:
        """The file of the adapters that are kept."""
        if self._folder is None:
            raise ConfigurationError("OverOptimisationGuard knows its folder once fitting has begun; or give a dirpath")
        return self._folder / "guarded.safetensors"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle prompts, held-out rewards and the folder."""
        if stage != "fit":
            return
        check_exportable(pl_module, type(self).__name__)
        held_out = getattr(getattr(trainer, "datamodule", None), "val_prompts", None) or []
        prompts = list(held_out if self.prompts is None else self.prompts)[: self.max_prompts]
        if not prompts:
            raise ConfigurationError("OverOptimisationGuard has no prompts; give them as prompts: [...]")
        self._prompts = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        self._names = _held_out(self.held_out, pl_module)
        if getattr(pl_module, "has_running_statistics", False):
            rank_zero_warn(
                "OverOptimisationGuard compares the trained reward over time, and the scale of "
                f"{type(pl_module.reward).__name__} moves with its statistics, so what it says may be wrong; train "
                "on a WeightedSum of fixed weights"
            )
        if self.action == "shrink" and not any(_is_factor(name) for name in trainable(pl_module)):
            raise ConfigurationError(
                "action=shrink scales LoRA adapters, and this model trains none; write warn or stop"
            )
        if self.action == "shrink" and uses_deepspeed(trainer):
            raise ConfigurationError(
                "action=shrink scales parameters, of which DeepSpeed's optimiser keeps copies; write warn or stop"
            )
        run = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(run) / "lora"
        self.looks = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the base model; bring the kept adapters of a resumed run along when its folder has changed."""
        source = self._restored_folder and self._restored_folder / "guarded.safetensors"
        if trainer.is_global_zero and source and source.is_file() and source.resolve() != self.best_path.resolve():
            self.best_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.best_path)
        with observing(pl_module), trainer.precision_plugin.forward_context(), pl_module.model.base():  # type: ignore[union-attr, operator]
            self._base_images, scores = self._sample(pl_module)
        self._scales = trainer.strategy.broadcast({name: _spread(scores[name]) for name in self._names})
        self._base = trainer.strategy.broadcast(self._seen(self._base_images, scores))
        if not self._peaks:
            self._take(0, self._base)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, keep the best adapters, act, log."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step in self.looks:
            return
        with averaged(trainer, pl_module):
            with observing(pl_module), trainer.precision_plugin.forward_context():
                look = trainer.strategy.broadcast(self._seen(*self._sample(pl_module)))
            fault = self._take(trainer.global_step, look)
            best = -math.inf if self.best_reward is None else self.best_reward
            if fault is None and math.isfinite(look.reward) and look.reward > best:
                self.best_reward, self.best_step = look.reward, trainer.global_step
                values = gather_full(pl_module)
                if trainer.is_global_zero:
                    metadata = {**header(trainer, pl_module), "guard": json.dumps(_flat(look))}
                    write(trainer, pl_module, self.best_path, metadata, values)
        self._strikes = 0 if fault is None else self._strikes + 1
        if fault is not None and self._strikes >= self.patience:
            self._act(trainer, fault)
        self._log(trainer, look)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Shrink the adapters, once validation has put the trained ones back in place of their average."""
        if self._shrink_next:
            self._shrink_next = False
            shrink_adapters(trainer, pl_module, self.shrink)

    def state_dict(self) -> dict[str, Any]:
        """What later looks are compared with, and what is left to do."""
        return {
            "counts": dict(self.counts),
            "best": (self.best_step, self.best_reward),
            "peaks": dict(self._peaks),
            "strikes": self._strikes,
            "shrink_next": self._shrink_next,
            "folder": str(self._folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run left off."""
        self.counts.update(state_dict["counts"])
        self.best_step, self.best_reward = state_dict["best"]
        self._peaks = dict(state_dict["peaks"])
        self._strikes = state_dict["strikes"]
        self._shrink_next = state_dict["shrink_next"]
        self._restored_folder = Path(state_dict["folder"])

    def falls(self, look: Look) -> dict[str, float]:
        """How far each held-out reward is below its best look, in standard deviations."""
        return {name: (self._peaks[name][0] - value) / self._scales[name] for name, value in look.held_out.items()}

    def _take(self, step: int, look: Look) -> str | None:
        """Remember a look; what is wrong with it, if anything."""
        self.looks[step] = look
        for name, value in look.held_out.items():
            if name not in self._peaks or value > self._peaks[name][0]:
                self._peaks[name] = value, look.reward
        name, fall = max(self.falls(look).items(), key=lambda item: item[1])
        value, reward = self._peaks[name]
        if fall > self.margin and look.reward > reward:
            return (
                f"the reward rose from {reward:.4g} to {look.reward:.4g} while {name} fell from {value:.4g} to "
                f"{look.held_out[name]:.4g}, {fall:.2g} standard deviations"
            )
        share = look.diversity / self._base.diversity if self._base.diversity > 0 else 1.0
        if self.min_diversity is not None and share < self.min_diversity and look.reward > self._base.reward:
            return f"pictures of one prompt differ by {share:.0%} of what the base model's do"
        return None

    def _act(self, trainer: L.Trainer, fault: str) -> None:
        self.counts[_DONE[self.action]] += 1
        self._strikes = 0
        self._shrink_next = self.action == "shrink"
        trainer.should_stop |= self.action == "stop"
        kept = f"the best adapters before, of step {self.best_step}, are in {self.best_path}"
        rank_zero_warn(
            f"over-optimised at step {trainer.global_step}: {fault}; "
            f"{_MESSAGES[self.action].format(self.shrink)}{'' if self.best_step is None else f'; {kept}'}"
        )

    def _log(self, trainer: L.Trainer, look: Look) -> None:
        values = {**_flat(look), "fall": max(self.falls(look).values()), **self.counts}
        metrics = {f"guard/{name}": float(value) for name, value in values.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _sample(self, pl_module: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Images `(N, 3, H, W)` and scores `(N,)` by name, on the CPU."""
        noise = pl_module.model.noise(len(self._prompts), torch.Generator().manual_seed(self.seed))
        images, scores = [], []
        for start in range(0, len(self._prompts), self.batch_size):
            some = slice(start, start + self.batch_size)
            images.append(pl_module.generate(self._prompts[some], noise=noise[some], seed=self.seed + start))
            scores.append(pl_module.score(images[-1], self._prompts[some]))
        joined = {name: torch.cat([each[name] for each in scores]).float().cpu() for name in ("reward", *self._names)}
        return torch.cat(images).float().cpu(), joined

    def _seen(self, images: Tensor, scores: Mapping[str, Tensor]) -> Look:
        return Look(
            reward=float(scores["reward"].mean()),
            held_out={name: float(scores[name].mean()) for name in self._names},
            drift=float(image_drift(images, self._base_images).mean()),
            diversity=float(within_prompt_diversity(images, self._prompts)),
            sharpness=float(Sharpness()(images.clamp(0, 1), self._prompts).mean()),
            saturated=float(saturated_share(images).mean()),
        )


_DONE = {"warn": "warned", "shrink": "shrunk", "stop": "stopped"}
_MESSAGES = {
    "warn": "training goes on; action=shrink or stop would act",
    "shrink": "the adapters are scaled by {:g}",
    "stop": "training stops",
}


@torch.no_grad()
def shrink_adapters(trainer: L.Trainer, pl_module: L.LightningModule, factor: float) -> None:
    """Scale the update `dW = s B A` of every LoRA layer, by `B`; also of their average where the run keeps one."""
    everything: list[Mapping[str, Tensor]] = [trainable(pl_module)]
    everything += [callback.average for callback in trainer.callbacks if isinstance(callback, AdapterEMA)]  # type: ignore[attr-defined]
    for tensors in everything:
        for name, tensor in tensors.items():
            if _is_factor(name):
                tensor.mul_(factor)


def _is_factor(name: str) -> bool:
    return ".lora_B." in name


def _flat(look: Look) -> dict[str, float]:
    """The numbers of a look by what they are logged as."""
    plain = {name: value for name, value in asdict(look).items() if name != "held_out"}
    return {**plain, **{f"held_out/{name}": value for name, value in look.held_out.items()}}


def _spread(scores: Tensor) -> float:
    """Standard deviation; 1 where all scores are equal."""
    return float(scores.std(correction=0)) or 1.0


def _held_out(names: list[str] | None, pl_module: Any) -> list[str]:
    """The held-out rewards to judge by.

    Raises:
        ConfigurationError: There are none, or not all are watched.
    """
    watched = list(getattr(pl_module, "eval_reward_names", []))
    if not watched:
        raise ConfigurationError(
            "OverOptimisationGuard compares the trained reward with held-out ones, and there are none; name rewards "
            "that are not trained on under `eval_rewards`"
        )
    unknown = sorted(set(names or []) - set(watched))
    if names == []:
        raise ConfigurationError("held_out=[] leaves nothing to judge by; leave it out to judge by all that is watched")
    if unknown:
        raise ConfigurationError(f"held_out: {', '.join(unknown)} is not watched; watched are {', '.join(watched)}")
    return watched if names is None else names
