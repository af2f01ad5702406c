"""Base LightningModule of all fine-tuning methods."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_draft.arguments import integer_at_least
from lightning_draft.chain import Probe
from lightning_draft.data import PromptDataModule
from lightning_draft.distributed import (
    check_not_spawned,
    clip_gradients,
    gather_full,
    trainable_parameters,
    uses_fsdp,
)
from lightning_draft.methods.batches import to_prompts
from lightning_draft.methods.checkpoints import check_checkpoint, is_reward_state, keep_trained
from lightning_draft.methods.checks import check_sampler, check_trainable
from lightning_draft.methods.evaluation import EvaluationModule
from lightning_draft.methods.nonfinite import NonFiniteGradients
from lightning_draft.methods.optimization import build_optimizer, scheduler_config, step_on_plateau
from lightning_draft.methods.stop_iteration import stop_iteration_is_error
from lightning_draft.models.base import DiffusionModel
from lightning_draft.models.guidance import Guidance
from lightning_draft.parameter_gradients import changes_gradients
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import Sampler
from lightning_draft.seeds import derive_seed

_CALIBRATION_IMAGES = 16


class RewardModule(EvaluationModule, ABC):
    """Base class of the fine-tuning methods: an `EvaluationModule` with optimizer, training state and checkpoints.

    A batch is a list of prompts, a list of rows with a `prompt` column, or a mapping of such columns.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase.
        sampler: The sampler in training and in validation; `DDIM(50)` by default.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer; it steps once per optimizer step, `ReduceLROnPlateau` once per
            validation.
        seed: Seed of the starting noise and of all random choices of the method, in `0..2^63 - 1`;
            by default 0, and on the command line that of `seed_everything`.

    Attributes:
        reward_queries: Number of images that the reward has scored in training.
        has_running_statistics: Whether the reward has statistics that training updates.
        probes: Called with every latent of a sampling step that has a graph.
        nonfinite_gradients: Drops gradients that are not finite, and stops training after `limit` in a row.
        checks_first_step: Whether `on_fit_start` runs `check_first_step`.
        lr: Learning rate that replaces the optimizer's, if set; Lightning's `LearningRateFinder` sets it.

    Raises:
        ConfigurationError: An evaluation reward has the name of another log key, or the seed is out of range.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=4e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, reward, sampler, eval_rewards, seed)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr: float | None = None
        self.reward_queries = 0
        self.probes: list[Probe] = []
        self.checks_first_step = True
        self.has_running_statistics = any(is_reward_state(f"reward.{key}") for key in reward.state_dict())
        self.nonfinite_gradients = NonFiniteGradients()
        self._plateau_is_due = False
        self._marked_step = -1
        self._marked_state: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle.

        Raises:
            ConfigurationError: It is pickled for a process that `ddp_spawn` starts.
        """
        check_not_spawned()
        return super().__getstate__()

    @property
    @abstractmethod
    def method(self) -> object:
        """The strategy that defines this method, for messages and file headers."""

    def strategies(self) -> dict[str, object]:
        """Return the strategies of the run by name, for file headers."""
        return {"method": self.method, "sampler": self.sampler, "reward": self.reward}

    def setup(self, stage: str) -> None:
        """Check the configuration before training."""
        super().setup(stage)
        self._marked_step = -1
        if stage == "fit":
            self.nonfinite_gradients.in_a_row = 0
            integer_at_least("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, 1)
            self.check_configuration()

    def check_configuration(self) -> None:
        """Run the checks that need no computation.

        Raises:
            ConfigurationError: Nothing is trained, or the sampler does not fit the model.
        """
        check_trainable(self.trainable_parameters())
        check_sampler(self.sampler, self.model.schedule)

    def on_fit_start(self) -> None:
        """Check the gradient on the first training prompt, and that guidance and negative prompts have an effect."""
        data = self.prompt_data
        guidance = getattr(self.model, "guidance", None)
        if isinstance(guidance, Guidance):
            guidance.check_interval(len(self.sampler.grid(self.model.schedule)))
            if data is not None:
                guidance.check_negative_column(data.train_prompts)
        if self.checks_first_step:
            self.check_first_step(["a photo"] if data is None else data.train_prompts[:1])

    @property
    def prompt_data(self) -> PromptDataModule | None:
        """The Trainer's data module, if it is a `PromptDataModule`."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data if isinstance(data, PromptDataModule) else None

    @abstractmethod
    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check on some prompts that the method's gradient reaches the trainable parameters.

        Raises:
            ConfigurationError: It does not reach them.
        """

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained and saved, by their names in this module."""
        return trainable_parameters(self)

    def training_steps_per_batch(self, batch_size: int) -> int:
        """Return the number of consecutive training steps that need the same batch of prompts."""
        return 1

    @stop_iteration_is_error
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.training_loss(to_prompts(batch))

    @abstractmethod
    def training_loss(self, prompts: list[str]) -> Tensor:
        """Return the loss of a training step, a scalar with a graph, and log metrics."""

    @stop_iteration_is_error
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradient of the loss."""
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trainable parameters and its learning-rate schedule."""
        optimizer = build_optimizer(self.optimizer, self.trainable_parameters().values(), self.lr)
        if self.lr_scheduler is None:
            return optimizer
        validates = self._trainer is None or self.trainer.enable_validation
        return {
            "optimizer": optimizer,
            "lr_scheduler": scheduler_config(self.lr_scheduler, optimizer, validates),
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop gradients that are not finite."""
        self.nonfinite_gradients.handle(self.trainer, self, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as configured in the Trainer; Lightning does not clip by norm under `FSDPStrategy`."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and isinstance(self.trainer.strategy, FSDPStrategy):
            clip_gradients(self.model.denoiser, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_validation_start(self) -> None:
        """Record that `ReduceLROnPlateau` must be stepped after this validation."""
        self._plateau_is_due = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    def on_validation_end(self) -> None:
        """Step a `ReduceLROnPlateau` with the metric that it monitors."""
        self.finish_validation()

    def finish_validation(self) -> None:
        """Step the schedules after a validation, once; `LastCheckpoint` calls this before it saves."""
        due, self._plateau_is_due = self._plateau_is_due, False
        if due:
            step_on_plateau(self.trainer.lr_scheduler_configs, self.trainer.callback_metrics)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Mark the state before each optimizer step, and calibrate a reward that needs it on the first prompts."""
        if self._marked_step != self.trainer.global_step:
            self.mark_step()
        if not self.reward.needs_calibration:
            return
        prompts = to_prompts(batch)
        with self.trainer.precision_plugin.forward_context():
            for number in range(-(-_CALIBRATION_IMAGES // len(prompts))):
                seed = derive_seed(self.seed, number, self.global_rank, _CALIBRATION_IMAGES)
                with torch.no_grad():
                    samples = self.decoded(self.generate_latents(prompts, seed=seed))
                    self.update_statistics(self.reward.breakdown(samples, prompts)[1])

    def update_statistics(self, scores: Mapping[str, Tensor]) -> None:
        """Update the reward's running statistics with the scores of training images of all processes.

        Scores that are not finite do not change the statistics.

        Args:
            scores: The components of `reward.breakdown` by name, of this process's images.
        """
        scores = {name: value.detach() for name, value in scores.items()}
        if self._trainer is not None and self.trainer.world_size > 1:
            scores = {name: cast(Tensor, self.all_gather(value)).flatten() for name, value in scores.items()}
        if all(bool(value.isfinite().all()) for value in scores.values()):
            self.reward.update_statistics(scores)
        if self.has_running_statistics:
            self.clear_base_scores()

    def extra_state(self) -> dict[str, Any]:
        """Return the training state besides parameters: `reward`, the rewards' states by their state dict keys.

        Later training steps do not change the returned values.
        """
        modules = self.reward.named_modules(prefix="reward") if self.has_running_statistics else ()
        plain = nn.Module.get_extra_state
        states = {n: part.get_extra_state() for n, part in modules if type(part).get_extra_state is not plain}
        return {"reward": {f"{name}._extra_state": deepcopy(state) for name, state in states.items()}}

    def mark_step(self) -> None:
        """Mark the state after the last optimizer step; a checkpoint of an interrupted step saves this state."""
        self._marked_step = self.trainer.global_step
        self._marked_state = self.extra_state()

    @property
    def is_within_step(self) -> bool:
        """Whether there were training steps since the last optimizer step; checkpoints do not include them."""
        return self._marked_step == self.trainer.global_step

    def last_step_state(self) -> dict[str, Any]:
        """Return the `extra_state` after the last optimizer step, which belongs to the parameters in a checkpoint."""
        return self._marked_state if self.is_within_step else self.extra_state()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict; for a sharded model without frozen parameters, so that they are not gathered."""
        if args or kwargs or not uses_fsdp(self._trainer):
            return super().state_dict(*args, **kwargs)
        reward = self.reward.state_dict(prefix="reward.")
        return {**gather_full(self), **{key: value for key, value in reward.items() if is_reward_state(key)}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduce the checkpoint to the trained parameters and the rewards' states."""
        keep_trained(checkpoint, self.trainable_parameters(), self.last_step_state()["reward"])

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that the checkpoint has the same trainable parameters."""
        check_checkpoint(checkpoint, self.trainable_parameters(), compare_shapes=not uses_fsdp(self._trainer))

    @property
    def gradients_are_complete(self) -> bool:
        """Whether `torch.autograd.grad` returns the full, unscaled gradients of the trainable parameters."""
        return self._trainer is None or not changes_gradients(self._trainer)

    @contextmanager
    def first_step_context(self) -> Iterator[None]:
        """Enable gradients in the Trainer's precision with seeded generators; their states are restored afterwards."""
        precision = nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()
        with self._random_state(self.seed), torch.enable_grad(), precision:
            yield
