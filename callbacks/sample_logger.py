"""Log images of the base and the fine-tuned model for the same prompts and noise."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_draft.arguments import boolean, integer_at_least, prompt_list
from lightning_draft.callbacks.common import FixedSamples, fixed_prompts, reward_module, run_folder, sampling
from lightning_draft.callbacks.ema import averaged
from lightning_draft.callbacks.image_grid import comparison, log_image
from lightning_draft.files import atomic_path, remove_partial_files
from lightning_draft.rewards.samples import Samples
from lightning_draft.seeds import check_seed


class SampleLogger(Callback):
    """Generate images of fixed prompts and noise with the base and the fine-tuned model, and log them side by side.

    The grid of images, with the reward under each image, is logged as `samples` by every logger that accepts images,
    and written to `samples/step_<n>.png` in the run's folder. The mean scores of the trained and the evaluation rewards
    are logged as `samples/<name>`, and those of the base model as `samples/<name>_base`. Images are generated at the
    start of training, every `every_n_steps` steps and at the end of training.

    Note:
        Training gives bitwise the same result as without this callback. If the scale of the reward changes in training,
        as with `ZScoreSum`, the base model's images are scored again each time, so that both rewards are on the same
        scale. Every process generates the images, because sharded models need all processes; one process writes them.

    Example:
        ```python
        samples = SampleLogger(every_n_steps=50, prompts=["a red fox", "a blue house"])
        trainer = Trainer(max_steps=1000, callbacks=[samples])
        ```

    Args:
        every_n_steps: Optimization steps between grids.
        prompts: Prompts to sample; by default the data module's validation prompts.
        max_samples: Largest number of prompts; the first ones are used.
        seed: Seed of the starting noise and of a stochastic sampler's noise.
        min_size: Images whose shorter side has fewer pixels than this are enlarged by an integer factor.
        per_row: Number of prompts in a row of the grid.
        batch_size: Number of images generated at a time; by default all.
        to_files: Also write PNG files.
        dirpath: Folder of the files; by default `samples` in the run's folder.
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
        self.every_n_steps = integer_at_least("SampleLogger: every_n_steps", every_n_steps, 1)
        self.prompts = None if prompts is None else prompt_list(prompts, "SampleLogger: prompts")
        self.max_samples = integer_at_least("SampleLogger: max_samples", max_samples, 1)
        self.seed = check_seed(seed)
        self.min_size = integer_at_least("SampleLogger: min_size", min_size, 1)
        self.per_row = integer_at_least("SampleLogger: per_row", per_row, 1)
        self.batch_size = None if batch_size is None else integer_at_least("SampleLogger: batch_size", batch_size, 1)
        self.to_files = boolean("SampleLogger: to_files", to_files)
        self.dirpath = dirpath
        self._samples = FixedSamples([], seed)
        self._base: Samples | None = None
        self._base_scores: dict[str, Tensor] | None = None
        self._last_step = -1
        self._reported = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the prompts and the folder, and remove temporary files of a killed process."""
        if stage != "fit":
            return
        prompts = fixed_prompts(trainer, self.prompts, self.max_samples, self)
        self._samples = FixedSamples(prompts, self.seed, self.batch_size)
        self._folder = run_folder(trainer, self.dirpath, "samples")
        self._base = self._base_scores = None
        self._last_step = -1
        if self.to_files and trainer.is_global_zero:
            remove_partial_files(self._folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample the model before training, or in a resumed run if the grid of its step is due and missing."""
        if trainer.global_step % self.every_n_steps == 0:
            self.sample(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Sample every `every_n_steps` optimization steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample the model at the end of training."""
        self.sample(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last grid."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last grid, so that it is not written again."""
        self._last_step = state_dict["last_step"]

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate, score and log the images, unless this was done for the current step."""
        step, module = trainer.global_step, reward_module(pl_module, self)
        if step == self._last_step:
            return
        with sampling(trainer, module):
            if self._base is None:
                with module.model.base():
                    self._base = self._samples.generate(module)
            if self._base_scores is None or module.has_running_statistics:
                self._base_scores = self._samples.score(module, self._base)
            with averaged(trainer, module):
                tuned = self._samples.generate(module)
                scores = self._samples.score(module, tuned)
        if trainer.is_global_zero:
            images = {"base": self._base.content, "fine-tuned": tuned.content}
            self._log(trainer, step, images, {"base": self._base_scores, "fine-tuned": scores})
        self._last_step = step

    def _log(
        self, trainer: L.Trainer, step: int, images: dict[str, Tensor], scores: dict[str, dict[str, Tensor]]
    ) -> None:
        rewards = {label: each["reward"] for label, each in scores.items()}
        base, tuned = (float(rewards[name].mean()) for name in ("base", "fine-tuned"))
        means = {f"samples/{name}": float(score.mean()) for name, score in scores["fine-tuned"].items()}
        means |= {f"samples/{name}_base": float(score.mean()) for name, score in scores["base"].items()}
        grid = comparison(
            self._samples.prompts,
            images,
            rewards,
            min_size=self.min_size,
            per_row=self.per_row,
            title=f"step {step}: mean reward {base:.4g} (base), {tuned:.4g} (fine-tuned)",
        )
        without = []
        for logger in trainer.loggers:
            if not log_image(logger, "samples", grid, step):
                without.append(type(logger).__name__)
            logger.log_metrics(means, step)
        self._report(without, all_without=len(without) == len(trainer.loggers))
        if self.to_files:
            with atomic_path(self._folder / f"step_{step:06d}.png") as partial:
                grid.save(partial, format="PNG")

    def _report(self, without: list[str], all_without: bool) -> None:
        """Report once which loggers accept no images."""
        if self._reported:
            return
        self._reported = True
        if all_without and not self.to_files:
            rank_zero_warn(
                "SampleLogger's images are not saved: no logger accepts images, and to_files is False; set "
                "to_files=True or use a TensorBoardLogger"
            )
        elif without:
            place = f"they are in {self._folder}" if self.to_files else "the other loggers have them"
            rank_zero_info(f"SampleLogger: {', '.join(without)} accepts no images; {place}")
