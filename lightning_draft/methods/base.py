"""What all fine-tuning methods share, as a LightningModule."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.distributed import (
    clip_gradients,
    gather_full,
    shard,
    trainable_parameters,
    uses_deepspeed,
    uses_fsdp,
)
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.checks import check_sampler, check_trainable
from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward, check_name, check_scores
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.seeds import derive_seed

_CALIBRATION = 16
_STEPS = 1  # tells the stream of the steps' noise from that of the starting noise


class RewardModule(L.LightningModule, ABC):
    """What every method shares: model, sampler, rewards, optimiser, validation, and checkpoints of what is trained.

    Args:
        model: The diffusion model, with its adapters.
        reward: What to raise.
        sampler: How images are sampled, in training and in validation; `DDIM(50)` by default.
        eval_rewards: Rewards that are reported on validation images and never trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once an optimisation step.
        seed: Of the starting noise and of every random choice of a method.

    Attributes:
        reward_queries: How many images the reward has been asked about in training.
        has_running_statistics: Whether the reward's scale depends on statistics that training updates.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=4e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.reward = _frozen(reward)
        eval_rewards = eval_rewards or {}
        taken = {"reward", "gain"} & eval_rewards.keys()
        if taken:
            raise ConfigurationError(
                f"`{taken.pop()}` is the trained reward's own name; give the evaluation reward another name"
            )
        self.eval_reward_names = [check_name(name) for name in eval_rewards]
        self.eval_rewards = nn.ModuleList(_frozen(other) for other in eval_rewards.values())
        self.sampler = DDIM(50) if sampler is None else sampler
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.reward_queries = 0
        self.strict_loading = False
        self.has_running_statistics = any(_learnt(f"reward.{key}") for key in reward.state_dict())
        self._base_scores: dict[tuple[Any, ...], Tensor] = {}
        self._step_state: tuple[int, dict[str, Any]] = (-1, {})  # by which optimiser step, and what

    @property
    @abstractmethod
    def method(self) -> object:
        """The strategy that makes this method what it is, for messages and file headers."""

    def setup(self, stage: str) -> None:
        """Check the configuration before a fit, and drop the base model's cached scores, which may no longer hold."""
        self._base_scores.clear()
        self._step_state = (-1, {})
        if stage == "fit":
            self.check_configuration()

    def check_configuration(self) -> None:
        """Check what needs no computation.

        Raises:
            ConfigurationError: A combination cannot learn.
        """
        check_trainable(self.trainable_parameters())
        check_sampler(self.sampler, self.model.schedule)

    def on_fit_start(self) -> None:
        """Check the gradient on the first training prompt."""
        datamodule = self.trainer.datamodule
        known = isinstance(datamodule, PromptDataModule)
        self.check_first_step(datamodule.train_prompts[:1] if known else ["a photo"])

    @abstractmethod
    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check on some prompts that the method's gradient reaches what is trained.

        Raises:
            ConfigurationError: It does not.
        """

    def configure_model(self) -> None:
        """Spread the denoiser over the processes, where the Trainer's strategy does so."""
        shard(self, self.model)

    def train(self, mode: bool = True) -> Self:
        """Rewards stay in eval mode: dropout would make their scores noise."""
        super().train(mode)
        self.reward.eval()
        self.eval_rewards.eval()
        return self

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is optimised and saved, by its name in this module."""
        return trainable_parameters(self)

    def training_steps_per_batch(self, batch_size: int) -> int:
        """How many training steps in a row are given the same batch of prompts."""
        return 1

    def configure_optimizers(self) -> Any:
        """Hand the trainable parameters to the optimiser, and the optimiser to the schedule."""
        optimizer = self.optimizer(self.trainable_parameters().values())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says; Lightning does not clip by norm under `FSDPStrategy`."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and isinstance(self.trainer.strategy, FSDPStrategy):
            clip_gradients(self.model, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Sample images, float32 `(B, 3, H, W)`, not clamped.

        Args:
            prompts: `B` prompts.
            noise: Starting latents `(B, ...)`; drawn from `seed` where they are not given.
            seed: Of the starting noise and, in a stream of its own, of a stochastic sampler's; the module's own by
                default. The caller's random state is left as it was.
        """
        seed = self.seed if seed is None else seed
        with self._random_state(derive_seed(seed, _STEPS)):
            if noise is None:
                noise = self.model.noise(len(prompts), torch.Generator().manual_seed(seed))
            chain = SamplingChain(self.model, self.sampler, self.model.encode(prompts))
            return self.model.decode(chain.advance(chain.start(noise)).x)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores `(B,)` of images clamped to [0, 1]: `reward`, its parts, and the watched rewards."""
        images = images.float().clamp(0, 1)
        total, parts = self.reward.breakdown(images, prompts)
        check_scores(total, len(prompts), self.reward)
        watched = {
            name: check_scores(reward(images, prompts), len(prompts), reward)
            for name, reward in zip(self.eval_reward_names, self.eval_rewards, strict=True)
        }
        return {"reward": total, **{f"reward/{name}": part for name, part in parts.items()}, **watched}

    def validation_step(self, prompts: Sequence[str], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score held-out prompts from fixed noise; `val/gain` is what was gained over the base on the same noise."""
        seed = derive_seed(self.seed, dataloader_idx, batch_idx, self.global_rank)
        scores = self.score(self.generate(prompts, seed=seed), prompts)
        key = (seed, *prompts)
        if key not in self._base_scores:
            with self.model.base():
                self._base_scores[key] = self.score(self.generate(prompts, seed=seed), prompts)["reward"]
        values = {f"val/{name}": value.mean() for name, value in scores.items()}
        values["val/gain"] = (scores["reward"] - self._base_scores[key]).mean()
        self.log_dict(values, on_epoch=True, batch_size=len(prompts), sync_dist=True, add_dataloader_idx=False)

    def on_train_batch_start(self, prompts: Sequence[str], batch_idx: int) -> None:
        """Show a reward with running statistics images of the first prompts, before it is trained on."""
        if self._step_state[0] != self.trainer.global_step:
            self._step_state = self.trainer.global_step, self.extra_state()
        if not self.reward.needs_calibration:
            return
        with self.trainer.precision_plugin.forward_context():
            for number in range(-(-_CALIBRATION // len(prompts))):
                images = self.generate(prompts, seed=derive_seed(self.seed, number, self.global_rank, _CALIBRATION))
                with torch.no_grad():
                    self.update_statistics(self.reward.breakdown(images.float(), prompts)[1])

    def update_statistics(self, parts: Mapping[str, Tensor]) -> None:
        """Let the reward learn from the scores of training images, those of all processes.

        Args:
            parts: As `reward.breakdown` names them, of this process's images.
        """
        parts = {name: value.detach() for name, value in parts.items()}
        if self._trainer is not None and self.trainer.world_size > 1:
            parts = {name: cast(Tensor, self.all_gather(value)).flatten() for name, value in parts.items()}
        self.reward.update_statistics(parts)
        if self.has_running_statistics:  # and no longer scores the base's images as it did
            self._base_scores.clear()

    def extra_state(self) -> dict[str, Any]:
        """What training changes besides parameters, as it is now: `learnt`, the states of rewards by their keys."""
        parts = self.reward.named_modules(prefix="reward") if self.has_running_statistics else ()
        own = nn.Module.get_extra_state
        states = {n: part.get_extra_state() for n, part in parts if type(part).get_extra_state is not own}
        return {"learnt": {f"{name}._extra_state": deepcopy(state) for name, state in states.items()}}

    def last_step_state(self) -> dict[str, Any]:
        """What `memory` was after the last optimiser step, which is what a checkpoint's parameters belong to."""
        step, state = self._step_state
        return state if step == self.trainer.global_step else self.extra_state()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Everything; of a sharded model what a checkpoint keeps, so that the frozen parts are not gathered for it."""
        if args or kwargs or not uses_fsdp(self._trainer):
            return super().state_dict(*args, **kwargs)
        learnt = {k: v for k, v in self.reward.state_dict(prefix="reward.").items() if _learnt(k)}
        return {**gather_full(self), **learnt}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained and what rewards have learnt: the frozen parts come from where they came from."""
        trained, learnt = self.trainable_parameters(), self.last_step_state()["learnt"]
        kept = {k: v for k, v in checkpoint["state_dict"].items() if k in trained or _learnt(k)}
        checkpoint["state_dict"] = {k: learnt.get(k, v) for k, v in kept.items()}
        checkpoint["trained"] = sorted(trained)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other adapters, which loading would pass over or report name by name."""
        ours = self.trainable_parameters()
        # Strategies that shard have loaded the values by now, and hand on the names alone.
        theirs = {name: value for name, value in checkpoint.get("state_dict", {}).items() if not _learnt(name)}
        odd = sorted(ours.keys() ^ set(checkpoint.get("trained", theirs)))
        if odd:
            raise ConfigurationError(
                f"the checkpoint holds other trainable parameters than this model ({len(odd)} differ, such as "
                f"{odd[0]!r}); use the config that the run saved beside it"
            )
        for name, value in ({} if uses_fsdp(self._trainer) else ours).items():
            if name in theirs and value.shape != theirs[name].shape:
                what = "the LoRA ranks differ" if ".lora_" in name else "the networks differ"
                raise ConfigurationError(
                    f"the checkpoint's {name!r} has shape {tuple(theirs[name].shape)} and this model's "
                    f"{tuple(value.shape)}: {what}; use the config that the run saved beside it"
                )

    @property
    def gradients_are_whole(self) -> bool:
        """Whether plain `torch.autograd.grad` gives the gradients of the trainable parameters, unscaled."""
        scaler = getattr(self._trainer and self._trainer.precision_plugin, "scaler", None)
        return not (uses_fsdp(self._trainer) or uses_deepspeed(self._trainer) or scaler is not None)

    @contextmanager
    def first_step_context(self) -> Iterator[None]:
        """Enable gradients in the Trainer's precision, with seeded random generators that are restored afterwards."""
        precision = nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()
        with self._random_state(self.seed), torch.enable_grad(), precision:
            yield

    @contextmanager
    def _random_state(self, seed: int) -> Iterator[None]:
        """Seed torch's generators within the context and put them back after it."""
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield


def _frozen(reward: Reward) -> Reward:
    return reward.eval().requires_grad_(False)


def _learnt(key: str) -> bool:
    """Whether a key of the state dict is what a reward has learnt in training."""
    return key.startswith("reward.") and key.endswith("_extra_state")
