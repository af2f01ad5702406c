"""Stop or slow down over-optimization: the trained reward rises while rewards that are not trained on fall.

References:
    Gao et al., "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760. Clark et al., arXiv:2309.17400,
    section 5.4 (reward hacking: collapse to one image with a high reward; smaller LoRA scales reverse it).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_draft.arguments import at_least, in_range, integer_at_least, one_of
from lightning_draft.callbacks.adapter_files import check_exportable, copy_from_resumed_run, write
from lightning_draft.callbacks.common import FixedSamples, fixed_prompts, reward_module, run_folder
from lightning_draft.callbacks.ema import averaged, restore_trained
from lightning_draft.callbacks.evaluation import Evaluation, Evaluator, select_eval_rewards
from lightning_draft.callbacks.lora_header import header
from lightning_draft.callbacks.shrink import is_factor, shrink_adapters
from lightning_draft.distributed import gather_full, uses_deepspeed
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import remove_partial_files
from lightning_draft.methods.base import RewardModule
from lightning_draft.seeds import check_seed

Action = Literal["warn", "shrink", "stop"]


class OverOptimizationGuard(Callback):
    """Evaluate the model on fixed prompts and noise at each validation, and act on over-optimization.

    The degradation of an evaluation reward is its best mean so far (including the base model's) minus its current mean,
    in standard deviations of the scores of the base model's images. The model is over-optimized if a degradation
    exceeds `margin` while the trained reward is higher than at that best evaluation. With `min_diversity`, it is also
    over-optimized if the diversity within a prompt is below that fraction of the base model's diversity while the
    trained reward is above that of the base model. After `patience` such evaluations in a row the action is

    - `warn`: warn;
    - `shrink`: warn, scale the update `dW` of the adapters by `shrink`, and continue training from there;
    - `stop`: warn, and end training.

    With every action, `guarded.safetensors`, beside the files of `LoRAExport`, contains the adapters with the highest
    trained reward of all evaluations without over-optimization. The log keys under `guard/` are `reward`,
    `eval/<name>`, `degradation` (the largest), `image_drift`, `diversity`, `sharpness`, `saturated_pixel_fraction`, and
    the number of actions so far: `warned`, `shrunk`, `stopped`.

    Note:
        With `warn`, training gives bitwise the same result as without the guard.

    Example:
        ```python
        module = DraftModule(model, JPEGSize(), eval_rewards={"aesthetic": AestheticScore()})
        trainer = Trainer(max_steps=1000, val_check_interval=50, callbacks=[OverOptimizationGuard("stop", patience=2)])
        ```

    Args:
        action: What to do if the model is over-optimized.
        margin: Largest accepted degradation of an evaluation reward, in standard deviations, at least 0.
        eval_rewards: Names of the module's `eval_rewards` to compare with; by default all.
        min_diversity: Smallest accepted fraction of the base model's diversity, in [0, 1]; by default diversity is only
            logged.
        patience: Number of over-optimized evaluations in a row before the action.
        shrink: Factor of `dW`, in [0, 1].
        prompts: Prompts to sample; by default the data module's validation prompts.
        max_prompts: Largest number of prompts; the first ones are used.
        samples_per_prompt: Samples of each prompt, at least 2.
        batch_size: Number of images generated at a time.
        seed: Seed of the starting noise and of a stochastic sampler's noise.
        dirpath: Folder of the file; by default `lora` in the run's folder.

    Attributes:
        counts: Number of actions: `warned`, `shrunk`, `stopped`.
        best_step: Number of optimization steps of the adapters in the file; `None` before the first.
        best_reward: Their trained reward.
        history: All evaluations of this run, by the number of finished optimization steps; 0 is the base model.
    """

    def __init__(
        self,
        action: Action = "warn",
        margin: float = 0.5,
        eval_rewards: list[str] | None = None,
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
        self.action = cast(Action, one_of("OverOptimizationGuard: action", action, get_args(Action)))
        self.margin = at_least("OverOptimizationGuard: margin", margin, 0.0)
        self.eval_rewards = eval_rewards
        self.min_diversity = (
            None if min_diversity is None else in_range("OverOptimizationGuard: min_diversity", min_diversity, 0.0, 1.0)
        )
        self.patience = integer_at_least("OverOptimizationGuard: patience", patience, 1)
        self.shrink = in_range("OverOptimizationGuard: shrink", shrink, 0.0, 1.0)
        self.prompts = prompts
        self.max_prompts = integer_at_least("OverOptimizationGuard: max_prompts", max_prompts, 1)
        self.samples_per_prompt = integer_at_least(
            "OverOptimizationGuard: samples_per_prompt",
            samples_per_prompt,
            2,
            "write 2 or more, because diversity is measured between samples of a prompt",
        )
        self.batch_size = integer_at_least("OverOptimizationGuard: batch_size", batch_size, 1)
        self.seed = check_seed(seed)
        self.dirpath = dirpath
        self.counts = dict.fromkeys(_DONE.values(), 0)
        self.best_step: int | None = None
        self.best_reward: float | None = None
        self.history: dict[int, Evaluation] = {}
        self._best_scores: dict[str, tuple[float, float]] = {}  # best mean, and the trained reward at that evaluation
        self._consecutive_violations = 0
        self._shrink_next = False
        self._evaluator: Evaluator | None = None
        self._folder: Path | None = None
        self._restored_folder: Path | None = None

    @property
    def best_path(self) -> Path:
        """The file of the best adapters that were not over-optimized."""
        if self._folder is None:
            raise ConfigurationError("OverOptimizationGuard has no folder before training starts; give it a dirpath")
        return self._folder / "guarded.safetensors"

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator, once training has started."""
        if self._evaluator is None:
            raise ConfigurationError("OverOptimizationGuard has no evaluator before training starts")
        return self._evaluator

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose prompts, evaluation rewards and the folder."""
        if stage != "fit":
            return
        module = reward_module(pl_module, self)
        check_exportable(module, self)
        self._check_action(trainer, module)
        prompts = fixed_prompts(trainer, self.prompts, self.max_prompts, self)
        repeated = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        names = select_eval_rewards(self.eval_rewards, module)
        self._evaluator = Evaluator(FixedSamples(repeated, self.seed, self.batch_size), names)
        self._folder = run_folder(trainer, self.dirpath, "lora")
        if trainer.is_global_zero:
            remove_partial_files(self._folder)
        self.history = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the base model; copy the best adapters of a resumed run if its folder has changed."""
        copy_from_resumed_run(trainer, self._restored_folder, self.best_path)
        self.evaluator.evaluate_base(trainer, reward_module(pl_module, self))
        if not self._best_scores:
            self._compare(0, self.evaluator.base)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the model, save the best adapters, act and log."""
        step = trainer.global_step
        if trainer.state.fn != "fit" or trainer.sanity_checking or step in self.history:
            return
        module = reward_module(pl_module, self)
        with averaged(trainer, module):
            evaluation = self.evaluator.evaluate(trainer, module)
            violation = self._compare(step, evaluation)
            if violation is None and self._is_best(evaluation.reward):
                values = gather_full(module)
                if trainer.is_global_zero:
                    metadata = {**header(trainer, module), "guard": json.dumps(evaluation.metrics())}
                    write(trainer, module, self.best_path, metadata, values)
                self.best_reward, self.best_step = evaluation.reward, step
        self._consecutive_violations = 0 if violation is None else self._consecutive_violations + 1
        if violation is not None and self._consecutive_violations >= self.patience:
            self._act(trainer, violation)
        self._log(trainer, evaluation)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Shrink the adapters in the next training step, so that the other callbacks use the evaluated adapters."""
        if self._shrink_next:
            restore_trained(trainer, pl_module)
            shrink_adapters(trainer, pl_module, self.shrink)
            self._shrink_next = False

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far and any pending action."""
        return {
            "counts": dict(self.counts),
            "best": (self.best_step, self.best_reward),
            "best_scores": dict(self._best_scores),
            "consecutive_violations": self._consecutive_violations,
            "shrink_next": self._shrink_next,
            "folder": str(self._folder),
            "history": {step: asdict(evaluation) for step, evaluation in self.history.items()},
            "base": None if self._evaluator is None else self._evaluator.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved run."""
        self.counts.update(state_dict["counts"])
        self.best_step, self.best_reward = state_dict["best"]
        self._best_scores = dict(state_dict["best_scores"])
        self._consecutive_violations = state_dict["consecutive_violations"]
        self._shrink_next = state_dict["shrink_next"]
        self._restored_folder = Path(state_dict["folder"])
        self.history = {step: Evaluation(**values) for step, values in state_dict["history"].items()}
        if state_dict["base"] is not None and self._evaluator is not None:
            self._evaluator.load_state_dict(state_dict["base"])

    def degradation(self, evaluation: Evaluation) -> dict[str, float]:
        """Return how far each evaluation reward is below its best mean, in standard deviations."""
        scales = self.evaluator.scales
        return {
            name: (self._best_scores[name][0] - value) / scales[name] for name, value in evaluation.eval_rewards.items()
        }

    def _compare(self, step: int, evaluation: Evaluation) -> str | None:
        """Add an evaluation to the history, and return the reason if it is over-optimized, else None."""
        self.history[step] = evaluation
        for name, value in evaluation.eval_rewards.items():
            if name not in self._best_scores or value > self._best_scores[name][0]:
                self._best_scores[name] = value, evaluation.reward
        name, degradation = max(self.degradation(evaluation).items(), key=lambda item: item[1])
        value, reward = self._best_scores[name]
        if degradation > self.margin and evaluation.reward > reward:
            return (
                f"the reward rose from {reward:.4g} to {evaluation.reward:.4g} while {name} fell from {value:.4g} to "
                f"{evaluation.eval_rewards[name]:.4g}, by {degradation:.2g} standard deviations"
            )
        base = self.evaluator.base
        ratio = evaluation.diversity / base.diversity if base.diversity > 0 else 1.0
        if self.min_diversity is not None and ratio < self.min_diversity and evaluation.reward > base.reward:
            return f"the diversity of the images of one prompt is {ratio:.0%} of the base model's"
        return None

    def _is_best(self, reward: float) -> bool:
        return math.isfinite(reward) and (self.best_reward is None or reward > self.best_reward)

    def _act(self, trainer: L.Trainer, violation: str) -> None:
        self.counts[_DONE[self.action]] += 1
        self._consecutive_violations = 0
        self._shrink_next = self.action == "shrink"
        trainer.should_stop |= self.action == "stop"
        kept = f"; the best adapters before this (step {self.best_step}) are in {self.best_path}"
        rank_zero_warn(
            f"over-optimized at step {trainer.global_step}: {violation}; "
            f"{_MESSAGES[self.action].format(self.shrink)}{'' if self.best_step is None else kept}"
        )

    def _log(self, trainer: L.Trainer, evaluation: Evaluation) -> None:
        worst = max(self.degradation(evaluation).values())
        values = {**evaluation.metrics(), "degradation": worst, **self.counts}
        metrics = {f"guard/{name}": float(value) for name, value in values.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _check_action(self, trainer: L.Trainer, module: RewardModule) -> None:
        if module.has_running_statistics:
            rank_zero_warn(
                "OverOptimizationGuard compares the trained reward over time, and the scale of "
                f"{type(module.reward).__name__} changes with its statistics, so its decisions may be wrong; train on "
                "a WeightedSum with fixed weights"
            )
        if self.action == "shrink" and not any(is_factor(name) for name in module.trainable_parameters()):
            raise ConfigurationError(
                "OverOptimizationGuard: action='shrink' scales LoRA adapters, and this model trains none; write warn "
                "or stop"
            )
        if self.action == "shrink" and uses_deepspeed(trainer):
            raise ConfigurationError(
                "OverOptimizationGuard: action='shrink' is not supported with DeepSpeed, whose optimizer keeps copies "
                "of the parameters; write warn or stop"
            )


_DONE = {"warn": "warned", "shrink": "shrunk", "stop": "stopped"}
_MESSAGES = {
    "warn": "training continues unchanged; set action to shrink or stop to prevent it",
    "shrink": "the adapters are scaled by {:g}",
    "stop": "training stops",
}
