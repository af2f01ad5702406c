"""LightningModules that fine-tune a diffusion model on a reward.

References:
    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400 (DRaFT).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.chain import PredictionDrift, Probe, Recompute, SamplingChain
from lightning_draft.losses import Maximize, RewardLoss
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.checks import (
    check_differentiable,
    check_dtype,
    check_final_step,
    check_gradient,
    check_latents,
    check_loss,
    check_reward,
)
from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.samplers import Sampler
from lightning_draft.seeds import derive_seed
from lightning_draft.truncation import LastK, Truncation

__all__ = ["Checkpointing", "DraftModule", "RewardModule"]

Checkpointing = Literal["auto", "none", "step", "block", "both"]


class DraftModule(RewardModule):
    """Back-propagate a differentiable reward through the sampler; where the gradient flows is the truncation's say.

    Args:
        model: The diffusion model, with its adapters.
        reward: What to raise; it must be differentiable.
        sampler: How images are sampled; `DDIM(50)` by default.
        truncation: Where gradient flows; `LastK(1)` by default, which is DRaFT-1.
        loss: Map from reward to loss; `Maximize()` by default.
        eval_rewards: Rewards that are reported on validation images and never trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once an optimisation step.
        kl_weight: Weight of `mean (eps_theta - eps_base)^2` over the steps with gradient (DRaFT+); each of those
            steps then costs one more network call.
        checkpointing: What the backward pass recomputes: the network call of each `step`, each `block` inside the
            network, `both` or `none`; `auto` is `step` where more than one step has a gradient, else `none`.
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
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=4e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        kl_weight: float = 0.0,
        checkpointing: Checkpointing = "auto",
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed)
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
        model.checkpoint_blocks(self.recompute.blocks)

    @property
    def method(self) -> Truncation:
        """The truncation."""
        return self.truncation

    def check_configuration(self) -> None:
        """Check that the reward has a gradient, something is trained, and the sampler and the truncation fit the model.

        Raises:
            ConfigurationError: One of them does not hold.
        """
        check_differentiable(self.reward, type(self).__name__)
        super().check_configuration()
        check_final_step(self.truncation, self.sampler, self.model.schedule)

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Run the method on some prompts and check the gradient from the reward back to what is trained.

        The random state, the parameters and their gradients are left as they were.

        Raises:
            ConfigurationError: The gradient is missing, zero or not finite; the message says where.
        """
        check_dtype(self.trainable_parameters())
        probes, self.probes = self.probes, []
        try:
            with self.first_step_context():
                chain = self.chain(prompts, torch.Generator().manual_seed(self.seed))
                latents = self.truncation(chain, self.model.noise(len(prompts)))
                check_latents(latents, self.truncation)
                with torch.no_grad():
                    images = self.model.decode(latents).float()
                prompts = list(prompts) * (len(latents) // len(prompts))
                check_reward(self.reward, images, prompts)
                if self.gradients_are_whole:
                    rewards = self._rewards(latents, prompts)[0]
                    check_gradient(rewards.sum(), self.trainable_parameters().values(), "reward")
                    check_loss(self.loss, rewards)
        finally:
            self.probes = probes

    def training_step(self, prompts: Sequence[str], batch_idx: int) -> Tensor:
        """Sample with gradient, reward, and return the loss."""
        batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        with self._random_state(derive_seed(self.seed, batch, self.global_rank)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, batch))
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
        drift = PredictionDrift() if self.kl_weight > 0 else None
        chain = self.chain(prompts, generator, drift)
        latents = self.truncation(chain, self.model.noise(len(prompts)))
        copies = len(latents) // len(prompts)
        rewards, parts, saturated = self._rewards(latents, list(prompts) * copies)
        self.update_statistics(parts)
        # The copies of DRaFT-LV add up; the batch is averaged.
        loss = self.loss(rewards).view(copies, -1).sum(0).mean()
        logs = {
            "train/reward": rewards[: len(prompts)].mean(),
            **{f"train/reward/{name}": part[: len(prompts)].mean() for name, part in parts.items()},
            "train/out_of_range_fraction": saturated.mean(),
        }
        if drift is not None and drift.mean is not None:
            logs["train/prediction_drift"] = drift.mean
            loss = loss + self.kl_weight * drift.mean
        return loss, {name: value.detach() for name, value in {**logs, "train/loss": loss}.items()}

    @property
    def recompute(self) -> Recompute:
        """What the backward pass of a training step recomputes."""
        several = self.truncation.gradient_steps(self.sampler.num_steps) > 1
        steps = self.checkpointing in ("step", "both") or (self.checkpointing == "auto" and several)
        return Recompute(steps, self.checkpointing in ("block", "both"), self.micro_batch_size)

    def chain(
        self,
        prompts: Sequence[str],
        generator: torch.Generator | None = None,
        drift: PredictionDrift | None = None,
    ) -> SamplingChain:
        """Build the chain of a training step."""
        return SamplingChain(
            self.model,
            self.sampler,
            self.model.encode(prompts),
            recompute=self.recompute,
            generator=generator,
            drift=drift,
            probes=tuple(self.probes),
        )

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
