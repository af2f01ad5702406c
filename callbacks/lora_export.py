"""Adapters as files that diffusers opens: the last ones and the best ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.callbacks.ema import averaged
from lightning_draft.distributed import gather_full, uses_fsdp
from lightning_draft.errors import ConfigurationError
from lightning_draft.redaction import redact

_FALLBACK = "train/reward"


class LoRAExport(Callback):
    """Write `last.safetensors` and `best.safetensors`, which the pipeline's `load_lora_weights` opens.

    Files are written when validation ends, every `every_n_steps` steps, when training ends and when it is interrupted,
    always as a whole. Where processes hold parts of the adapters, putting them together takes all processes: there an
    interrupted training leaves the files of the last export. The best adapters are those with the best `monitor`; as
    long as the run has not logged it, `train/reward` decides, averaged over the steps since the last look. The header
    names the base model, reward, method, sampler, step and scores. Adapters that are not finite are never written.

    Args:
        monitor: The metric that decides what is best.
        mode: Whether the best is the greatest (`max`) or the least (`min`).
        every_n_steps: Optimisation steps between files.
        dirpath: Where to write; by default `lora` in the run's folder.

    Attributes:
        best_score: Value of the metric at the best adapters; `None` before the first.
        best_metric: The metric that decided.
        best_step: Optimisation steps behind the best adapters.
    """

    def __init__(
        self,
        monitor: str = "val/reward",
        mode: Literal["max", "min"] = "max",
        every_n_steps: int = 100,
        dirpath: str | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigurationError(f"mode={mode!r} is not known; write max or min")
        if every_n_steps < 1:
            raise ConfigurationError(f"LoRAExport: every_n_steps={every_n_steps} must be at least 1")
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.best_score: float | None = None
        self.best_metric: str | None = None
        self.best_step: int | None = None
        self._folder: Path | None = None
        self._restored_folder: Path | None = None
        self._rewards: list[float] = []
        self._last_step = -1
        self._validated_step = -1

    @property
    def last_path(self) -> Path:
        """The file of the last adapters."""
        return self._path("last")

    @property
    def best_path(self) -> Path:
        """The file of the best adapters."""
        return self._path("best")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder."""
        if stage != "fit":
            return
        check_exportable(pl_module, type(self).__name__)
        run = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(run) / "lora"
        self._last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the best adapters of a resumed run along when its folder has changed."""
        source = self._restored_folder and self._restored_folder / "best.safetensors"
        if trainer.is_global_zero and source and source.is_file() and source.resolve() != self.best_path.resolve():
            self.best_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.best_path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Export every `every_n_steps` optimisation steps."""
        reward = trainer.callback_metrics.get(_FALLBACK)
        if reward is not None:
            self._rewards.append(float(reward))
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self.export(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export with the scores of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            self.export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what training ended with."""
        if trainer.global_step != self._last_step:
            self.export(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what an interrupted training had reached, unless that takes other processes, which may be elsewhere."""
        if trainer.state.fn != "fit" or self._folder is None or trainer.global_step == 0:
            return
        if uses_fsdp(trainer) and trainer.world_size > 1:
            rank_zero_warn(
                f"interrupted at step {trainer.global_step}: the adapters exported last are of {self._last_step}"
            )
        else:
            self.export(trainer, pl_module, judge=False)

    def export(self, trainer: L.Trainer, pl_module: L.LightningModule, judge: bool = True) -> None:
        """Write the last adapters, and the best ones if these are; the average of them where the run keeps one.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            judge: Whether these adapters may become the best ones.
        """
        self._last_step = trainer.global_step
        with averaged(trainer, pl_module):
            values = gather_full(pl_module)
            if not all(bool(value.isfinite().all()) for value in values.values()):
                rank_zero_warn(f"the adapters are not finite at step {trainer.global_step}: they are not exported")
                return
            best = judge and self._is_best(trainer)
            if trainer.is_global_zero:
                metadata = header(trainer, pl_module, validated=self._validated_step == trainer.global_step)
                for path in [self.last_path, self.best_path][: 1 + best]:
                    write(trainer, pl_module, path, metadata, values)

    def state_dict(self) -> dict[str, Any]:
        """What was best, and where it lies."""
        return {
            "best_score": self.best_score,
            "best_metric": self.best_metric,
            "best_step": self.best_step,
            "folder": str(self._folder),
            "rewards": list(self._rewards),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to compare with what was best."""
        self.best_score = state_dict["best_score"]
        self.best_metric = state_dict["best_metric"]
        self.best_step = state_dict["best_step"]
        self._restored_folder = Path(state_dict["folder"])
        self._rewards = list(state_dict["rewards"])

    def _is_best(self, trainer: L.Trainer) -> bool:
        """Compare with the best so far, and remember."""
        metric, score = self._judged(trainer)
        if not math.isfinite(score):
            return False
        sign = -1 if metric == self.monitor and self.mode == "min" else 1
        if self.best_score is not None and self.best_metric == metric and sign * (score - self.best_score) <= 0:
            return False
        self.best_score, self.best_metric, self.best_step = score, metric, trainer.global_step
        return True

    def _judged(self, trainer: L.Trainer) -> tuple[str, float]:
        """The metric that decides now, and its value; not a number where there is none."""
        rewards, self._rewards = self._rewards, []
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and self.monitor != _FALLBACK:
            return self.monitor, float(value)
        if not rewards or self.best_metric not in (None, _FALLBACK):
            return self.monitor, math.nan
        return _FALLBACK, sum(rewards) / len(rewards)

    def _path(self, name: str) -> Path:
        if self._folder is None:
            raise ConfigurationError("LoRAExport knows its folder once fitting has begun; or give it a dirpath")
        return self._folder / f"{name}.safetensors"


def write(trainer: L.Trainer, pl_module: Any, path: Path, metadata: dict[str, str], values: dict[str, Tensor]) -> None:
    """Let the model write its adapters, or its pipeline as a folder if it trains weights of its own.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        path: Of the file.
        metadata: For its header.
        values: From `whole`; handed to the model where it holds a part of them only.
    """
    model, own = pl_module.model, None
    if uses_fsdp(trainer):
        own = {name.removeprefix("model."): value for name, value in values.items()}
    if getattr(model, "trainable", "lora") == "lora":
        model.save_lora(path, metadata, own)
    else:
        model.save_pipeline(path.with_suffix(""), metadata, own)


def check_exportable(pl_module: L.LightningModule, name: str) -> None:
    """Check that the adapters can be written as a file.

    Args:
        pl_module: The trainer's module.
        name: Who wants to write, for the message.

    Raises:
        ConfigurationError: The model cannot write.
    """
    if not hasattr(pl_module.model, "save_lora"):
        raise ConfigurationError(
            f"{type(pl_module.model).__name__} has no save_lora(path, metadata), so {name} cannot write; "
            "give the model one, or leave the callback out"
        )


def header(trainer: L.Trainer, pl_module: Any, validated: bool = True) -> dict[str, str]:
    """What a file says about how its adapters came about; every value is text, `scores` is JSON.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        validated: Whether the scores of the last validation are these adapters'.
    """
    prefixes = ("val/", _FALLBACK) if validated else (_FALLBACK,)
    parts = {
        "method": getattr(pl_module, "method", pl_module),
        "sampler": pl_module.sampler,
        "reward": pl_module.reward,
        "loss": getattr(pl_module, "loss", None),
    }
    scores = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefixes) and math.isfinite(float(value))
    }
    return {
        "base": str(getattr(pl_module.model, "pretrained", type(pl_module.model).__name__)),
        **{name: describe(part) for name, part in parts.items() if part is not None},
        "step": str(trainer.global_step),
        "scores": json.dumps(scores, sort_keys=True),
    }


def describe(thing: object) -> str:
    """Class and plain public attributes, such as `LastK(k=1)`; secrets are left out."""
    plain = {
        name: redact(value, name)
        for name, value in vars(thing).items()
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str))
    }
    return f"{type(thing).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"
