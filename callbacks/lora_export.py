"""Export the last and the best adapters as files that diffusers opens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_draft.arguments import boolean, integer_at_least, one_of
from lightning_draft.callbacks.adapter_files import check_exportable, copy_from_resumed_run, write
from lightning_draft.callbacks.artifacts import log_files
from lightning_draft.callbacks.common import reward_module, run_folder
from lightning_draft.callbacks.ema import averaged, check_averaging
from lightning_draft.callbacks.lora_header import header
from lightning_draft.callbacks.run_card import validation_changes, write_run_card
from lightning_draft.distributed import gather_full, uses_fsdp
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.files import remove_partial_files
from lightning_draft.model_card import CARD, check_repository, upload


class LoRAExport(Callback):
    """Write `last.safetensors` and `best.safetensors`, which the pipeline's `load_lora_weights` opens.

    The last adapters are written every `every_n_steps` steps, after each validation, at the end of training and when it
    is interrupted. The best adapters are those with the best `monitor` of all validations; without a validation there
    is no `best.safetensors`. Weights & Biases and MLflow loggers receive it at the end of training, with its file for
    ComfyUI and its model card. The header of a file contains the base model, reward, method, sampler, step and scores.

    Note:
        A file is replaced only when the new one is complete. Adapters that are not finite are never written. If the
        adapters are sharded over processes, an interrupted run keeps the files of the last export.

    Example:
        ```python
        module = DraftModule(model, JPEGSize(), eval_rewards={"aesthetic": AestheticScore()})
        export = LoRAExport()  # the best adapters are those with the best val/aesthetic
        Trainer(max_steps=1000, val_check_interval=50, callbacks=[export]).fit(module, data)
        ```

    Args:
        monitor: Name of the validation metric that decides which adapters are best; by default the module's first
            evaluation reward, `val/<name>`, or `val/reward` if there is none.
        mode: Whether the best value is the greatest (`max`) or the least (`min`).
        every_n_steps: Optimization steps between files.
        dirpath: Folder of the files; by default `lora` in the run's folder.
        comfy: Also write `last.comfy.safetensors` and `best.comfy.safetensors` with the names that ComfyUI, Forge and
            AUTOMATIC1111 read, for model families whose layer names are known.
        push_to_hub: `owner/name` of a repository on the Hugging Face hub; when training ends, the files and their model
            card are uploaded to it. It is created as a private one if it does not exist. A failed upload is a warning.

    Attributes:
        best_score: Value of the metric for the best adapters; `None` before the first validation.
        best_metric: The metric.
        best_step: Number of optimization steps of the best adapters.
        upload_failed: Whether the files could not be uploaded.
    """

    upload_failed = False

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        every_n_steps: int = 100,
        dirpath: str | None = None,
        comfy: bool = True,
        push_to_hub: str | None = None,
    ) -> None:
        self.comfy = boolean("LoRAExport: comfy", comfy)
        self.push_to_hub = push_to_hub if push_to_hub is None else check_repository(push_to_hub)
        self.monitor = monitor
        self.mode = one_of("LoRAExport: mode", mode, ("max", "min"))
        self.every_n_steps = integer_at_least("LoRAExport: every_n_steps", every_n_steps, 1)
        self.dirpath = dirpath
        self.best_score: float | None = None
        self.best_metric: str | None = None
        self.best_step: int | None = None
        self._folder: Path | None = None
        self._restored_folder: Path | None = None
        self._last_step = -1

    @property
    def last_path(self) -> Path:
        """The file of the last adapters."""
        return self._path("last")

    @property
    def best_path(self) -> Path:
        """The file of the best adapters."""
        return self._path("best")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder and the metric, and remove temporary files of a killed process."""
        if stage != "fit":
            return
        module = reward_module(pl_module, self)
        check_exportable(module, self)
        check_averaging(trainer.callbacks)  # type: ignore[attr-defined]
        self._folder = run_folder(trainer, self.dirpath, "lora")
        self.best_metric = self.monitor or f"val/{(*module.eval_reward_names, 'reward')[0]}"
        self._last_step = -1
        if trainer.is_global_zero:
            for folder in (self._folder, self._folder / "images"):
                remove_partial_files(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the best adapters of a resumed run if its folder has changed."""
        folder = self.best_path.parent
        images = [] if self._restored_folder is None else sorted((self._restored_folder / "images").glob("*.png"))
        for path in (self.best_path, self.best_path.with_suffix(".comfy.safetensors"), folder / CARD):
            copy_from_resumed_run(trainer, self._restored_folder, path)
        for image in images:
            copy_from_resumed_run(trainer, image.parent, folder / "images" / image.name)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Export every `every_n_steps` optimization steps."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self.export(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the adapters with the scores of the validation, and as the best adapters if the score has improved."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.export(trainer, pl_module, validated=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the adapters; log the best ones as an artifact, and upload the files to the hub if requested."""
        if trainer.global_step != self._last_step:
            self.export(trainer, pl_module)
        if trainer.is_global_zero:
            comfy = self.best_path.with_suffix(".comfy.safetensors")
            log_files(trainer, [self.best_path, comfy, self.best_path.parent / CARD], "lora")
        if self.push_to_hub is not None and trainer.is_global_zero:
            self.upload_failed = not upload(self.last_path.parent, self.push_to_hub)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Export the adapters of an interrupted run, unless other processes are needed for it or training diverged."""
        if trainer.state.fn != "fit" or self._folder is None or trainer.global_step in (0, self._last_step):
            return
        if (uses_fsdp(trainer) and trainer.world_size > 1) or isinstance(exception, DivergenceError):
            content = f"contains the adapters of step {self._last_step}" if self._last_step >= 0 else "was not written"
            rank_zero_warn(f"interrupted at step {trainer.global_step}: {self.last_path} {content}")
            return
        try:
            self.export(trainer, pl_module, interrupted=True)
        except ConfigurationError as error:  # the exception that interrupted training is the one to report
            rank_zero_warn(str(error))

    def export(
        self, trainer: L.Trainer, pl_module: L.LightningModule, validated: bool = False, interrupted: bool = False
    ) -> None:
        """Write the last adapters, and the best ones if the score has improved; with `AdapterEMA`, the averaged ones.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            validated: Whether the current metrics are those of a validation of these adapters.
            interrupted: Do not log the model card, because a run that is not interrupted has no card of this step.
        """
        module, step = reward_module(pl_module, self), trainer.global_step
        with averaged(trainer, module):
            values = gather_full(module)
            if not all(bool(value.isfinite().all()) for value in values.values()):
                rank_zero_warn(f"the adapters are not finite at step {step}: they are not exported")
                self._last_step = step
                return
            score = self._better_score(trainer) if validated else None
            changes = validation_changes(trainer, module) if validated else {}
            if trainer.is_global_zero:
                metadata = header(trainer, module, validated)
                for path in [self.last_path] if score is None else [self.last_path, self.best_path]:
                    write(trainer, module, path, metadata, values, self.comfy)
                if score is not None or not self.best_path.exists():
                    write_run_card(trainer, module, path, metadata, self.comfy, changes, log=not interrupted)
        self._last_step = step  # set last, so that an export that failed or was interrupted is repeated
        if score is not None:
            self.best_score, self.best_step = score, step

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the steps of both files, and their folder."""
        return {
            "best_score": self.best_score,
            "best_metric": self.best_metric,
            "best_step": self.best_step,
            "last_step": self._last_step,
            "folder": str(self._folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, unless the metric has changed."""
        self._restored_folder = Path(state_dict["folder"])
        self._last_step = state_dict["last_step"]
        if state_dict["best_metric"] == self.best_metric:
            self.best_score = state_dict["best_score"]
            self.best_step = state_dict["best_step"]

    def _better_score(self, trainer: L.Trainer) -> float | None:
        """Return the score of this validation if it is better than the best so far."""
        value = trainer.callback_metrics.get(str(self.best_metric))
        if value is None:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ConfigurationError(
                f"LoRAExport: monitor={self.best_metric!r} is not a metric of the validation; write one of "
                f"{', '.join(known)}"
            )
        score, sign = float(value), -1 if self.mode == "min" else 1
        removed = not (self.best_path.exists() or self.best_path.with_suffix("").exists())
        best = None if removed else self.best_score
        if not math.isfinite(score) or (best is not None and sign * (score - best) <= 0):
            return None
        return score

    def _path(self, name: str) -> Path:
        if self._folder is None:
            raise ConfigurationError("LoRAExport has no folder before training starts; give it a dirpath")
        return self._folder / f"{name}.safetensors"
