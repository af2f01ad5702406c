"""LightningModules that fine-tune a diffusion model on a reward.

References:
    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400 (DRaFT).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast, get_args

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.chain import Probe, SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Maximize, RewardLoss
from lightning_draft.models.base import DiffusionModel
from lightning_draft.preflight import check_setup, prove
from lightning_draft.rewards.base import Reward, check_name, check_scores
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.truncation import LastK, Truncation

Checkpointing = Literal["auto", "none", "step", "block", "both"]

_CALIBRATION = 16


class RewardModule(L.LightningModule, ABC):
    """What every method shares: model, sampler, rewards, optimiser, validation, and checkpoints of what is trained.

    Args:
        model: The diffusion model, with its adapters.
        reward: What to raise.
        sampler: How images are sampled, in training and in validation; `DDIM(50)` by default.
        watch: Rewards that are reported on validation images and never trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once an optimisation step.
        seed: Of the starting noise and of every random choice of a method.

    Attributes:
        reward_queries: How many images the reward has been asked about in training.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        watch: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=4e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.reward = _frozen(reward)
        watch = watch or {}
        taken = {"reward", "gain"} & watch.keys()
        if taken:
            raise ConfigurationError(
                f"`{taken.pop()}` is the trained reward's own name; call the watched one something else"
            )
        self.watch_names = [check_name(name) for name in watch]
        self.watch = nn.ModuleList(_frozen(other) for other in watch.values())
        self.sampler = DDIM(50) if sampler is None else sampler
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.reward_queries = 0
        self.strict_loading = False
        self._base_scores: dict[tuple[int, int], dict[str, Tensor]] = {}

    @property
    @abstractmethod
    def method(self) -> object:
        """The strategy that makes this method what it is, for messages and file headers."""

    def train(self, mode: bool = True) -> Self:
        """Rewards stay in eval mode: dropout would make their scores noise."""
        super().train(mode)
        self.reward.eval()
        self.watch.eval()
        return self

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is optimised and saved, by its name in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def steps_per_batch(self, batch_size: int) -> int:
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

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Sample images, float32 `(B, 3, H, W)`, not clamped.

        Args:
            prompts: `B` prompts.
            noise: Starting latents `(B, ...)`; drawn from `seed` where they are not given.
            seed: Of the starting noise and of a stochastic sampler's noise; the module's own by default. The caller's
                random state is left as it was.
        """
        seed = self.seed if seed is None else seed
        with self._random_state(seed):
            if noise is None:
                noise = self.model.noise(len(prompts), torch.Generator().manual_seed(seed))
            chain = SamplingChain(self.model, self.sampler, self.model.encode(prompts))
            return self.model.decode(chain.advance(chain.start(noise)).x)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores `(B,)` of images clamped to [0, 1]: `reward`, its parts, and the watched rewards."""
        images = images.float().clamp(0, 1)
        total, parts = self.reward.breakdown(images, prompts)
        watched = {name: reward(images, prompts) for name, reward in zip(self.watch_names, self.watch, strict=True)}
        return {"reward": total, **{f"reward/{name}": part for name, part in parts.items()}, **watched}

    def validation_step(self, prompts: Sequence[str], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score held-out prompts from fixed noise; `val/gain` is what was gained over the base on the same noise."""
        seed = _mix(self.seed, dataloader_idx, batch_idx, self.global_rank)
        scores = self.score(self.generate(prompts, seed=seed), prompts)
        key = (dataloader_idx, batch_idx)
        if key not in self._base_scores:
            with self.model.base():
                self._base_scores[key] = self.score(self.generate(prompts, seed=seed), prompts)
        values = {f"val/{name}": value.mean() for name, value in scores.items()}
        values["val/gain"] = (scores["reward"] - self._base_scores[key]["reward"]).mean()
        self.log_dict(values, on_epoch=True, batch_size=len(prompts), sync_dist=True, add_dataloader_idx=False)

    def on_train_batch_start(self, prompts: Sequence[str], batch_idx: int) -> None:
        """Show a reward with running statistics images of the first prompts, before it is trained on."""
        if not self.reward.uncalibrated:
            return
        with self.trainer.precision_plugin.forward_context():
            for number in range(-(-_CALIBRATION // len(prompts))):
                images = self.generate(prompts, seed=_mix(self.seed, number, self.global_rank, _CALIBRATION))
                with torch.no_grad():
                    self.observe(self.reward.breakdown(images.float(), prompts)[1])

    def observe(self, parts: Mapping[str, Tensor]) -> None:
        """Let the reward learn from the scores of training images, those of all processes.

        Args:
            parts: As `reward.breakdown` names them, of this process's images.
        """
        parts = {name: value.detach() for name, value in parts.items()}
        if self._trainer is not None and self.trainer.world_size > 1:
            parts = {name: cast(Tensor, self.all_gather(value)).flatten() for name, value in parts.items()}
        self.reward.observe(parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained and what rewards have learnt: the frozen parts come from where they came from."""
        trained = self.trainable_parameters()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained or _learnt(k)}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other adapters, which non-strict loading would pass over."""
        ours, theirs = set(self.trainable_parameters()), {k for k in checkpoint["state_dict"] if not _learnt(k)}
        if ours != theirs:
            odd = sorted(ours ^ theirs)
            raise ConfigurationError(
                f"the checkpoint holds other trainable parameters than this model ({len(odd)} differ, such as "
                f"{odd[0]!r}); use the config that the run saved beside it"
            )

    @contextmanager
    def _random_state(self, seed: int) -> Iterator[None]:
        """Seed torch's generators within the context and put them back after it."""
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield


class DraftModule(RewardModule):
    """Back-propagate a differentiable reward through the sampler; where the gradient flows is the truncation's say.

    Args:
        model: The diffusion model, with its adapters.
        reward: What to raise; it must be differentiable.
        sampler: How images are sampled; `DDIM(50)` by default.
        truncation: Where gradient flows; `LastK(1)` by default, which is DRaFT-1.
        loss: Map from reward to loss; `Maximize()` by default.
        watch: Rewards that are reported on validation images and never trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once an optimisation step.
        kl_weight: Weight of `mean (eps_theta - eps_base)^2` over the steps with gradient (DRaFT+); each of those
            steps then costs one more network call.
        checkpointing: Recompute activations by `step`, inside the network's `block`s, `both` or `none`; `auto` is
            `step` where more than one step carries a gradient, else `none`.
        micro_batch_size: Handle this many samples at a time wherever a graph is built; memory follows it, at the cost
            of recomputing.
        seed: Of the starting noise and of every random choice of the truncation.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        truncation: Truncation | None = None,
        loss: RewardLoss | None = None,
        watch: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=4e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        kl_weight: float = 0.0,
        checkpointing: Checkpointing = "auto",
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, reward, sampler, watch, optimizer, lr_scheduler, seed)
        self.truncation = LastK(1) if truncation is None else truncation
        self.loss = Maximize() if loss is None else loss
        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight} must not be negative")
        if checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"checkpointing={checkpointing!r} is not known; write one of {', '.join(get_args(Checkpointing))}"
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1")
        self.kl_weight = kl_weight
        self.checkpointing = checkpointing
        self.micro_batch_size = micro_batch_size
        self.probes: list[Probe] = []
        if checkpointing in ("block", "both"):
            model.checkpoint_blocks()

    @property
    def method(self) -> Truncation:
        """The truncation."""
        return self.truncation

    def setup(self, stage: str) -> None:
        """Refuse combinations that cannot learn, before anything is loaded onto a device."""
        if stage == "fit":
            check_setup(self)

    def on_fit_start(self) -> None:
        """Prove on one prompt that the reward's gradient reaches what is trained."""
        prove(self)

    def training_step(self, prompts: Sequence[str], batch_idx: int) -> Tensor:
        """Sample with gradient, reward, and return the loss."""
        batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        with self._random_state(_mix(self.seed, batch, self.global_rank)):
            generator = torch.Generator().manual_seed(_mix(self.seed, batch))
            loss, logs = self.loss_and_logs(prompts, generator)
        self.log("train/reward", logs.pop("train/reward"), prog_bar=True, batch_size=len(prompts))
        self.log_dict(logs, batch_size=len(prompts))
        return loss

    def loss_and_logs(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One draw of the loss, scalar with a graph, and what to log of it, detached.

        Args:
            prompts: The batch.
            generator: Source of the truncation's choices, the same on every process.
        """
        chain = self.chain(prompts, generator)
        latents = self.truncation(chain, self.model.noise(len(prompts)))
        copies = len(latents) // len(prompts)
        rewards, parts, saturated = self._rewards(latents, list(prompts) * copies)
        self.observe(parts)
        # The copies of DRaFT-LV add up; the batch is averaged.
        loss = self.loss(rewards).view(copies, -1).sum(0).mean()
        logs = {
            "train/reward": rewards[: len(prompts)].mean(),
            **{f"train/reward/{name}": part[: len(prompts)].mean() for name, part in parts.items()},
            "train/saturated": saturated.mean(),
        }
        if chain.drift is not None:
            logs["train/drift"] = chain.drift
            loss = loss + self.kl_weight * chain.drift
        return loss, {name: value.detach() for name, value in {**logs, "train/loss": loss}.items()}

    def chain(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> SamplingChain:
        """The chain that a training step walks."""
        several = self.truncation.gradient_steps(self.sampler.num_steps) > 1
        return SamplingChain(
            self.model,
            self.sampler,
            self.model.encode(prompts),
            checkpoint_steps=self.checkpointing in ("step", "both") or (self.checkpointing == "auto" and several),
            micro_batch_size=self.micro_batch_size,
            generator=generator,
            measure_drift=self.kl_weight > 0,
            probe=self._probe if self.probes else None,
        )

    def _probe(self, step: int, latent: Tensor) -> None:
        for probe in self.probes:
            probe(step, latent)

    def _rewards(self, latents: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Scores `(B,)`, their parts, and each image's share of pixels outside [0, 1]."""

        def reward(latents: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            images = self.model.decode(latents).float()
            total, parts = self.reward.breakdown(images, prompts)
            saturated = ((images < 0) | (images > 1)).float().flatten(1).mean(1)
            return check_scores(total, len(prompts), self.reward), parts, saturated

        self.reward_queries += len(latents)
        size = self.micro_batch_size or len(latents)
        if size >= len(latents):
            return reward(latents, prompts)
        pieces = [
            checkpoint(reward, latents[i : i + size], prompts[i : i + size], use_reentrant=False)
            for i in range(0, len(latents), size)
        ]
        totals, parts, saturated = zip(*pieces, strict=True)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return torch.cat(totals), joined, torch.cat(saturated)


def _frozen(reward: Reward) -> Reward:
    return reward.eval().requires_grad_(False)


def _learnt(key: str) -> bool:
    """Whether a key of the state dict is what a reward has learnt in training."""
    return key.startswith("reward.") and key.endswith("_extra_state")


def _mix(*numbers: int) -> int:
    """A seed made of several numbers, so that neighbours do not share a stream."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) % 2**63
    return seed
