"""Base class of the methods that use the gradient of the reward with respect to the images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.arguments import integer_at_least
from lightning_draft.chain import PredictionDrift, SamplingChain
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.checkpointing import Checkpointing, check_checkpointing, recomputed
from lightning_draft.methods.checks import check_differentiable, warn_of_large_parts
from lightning_draft.models.base import DiffusionModel
from lightning_draft.recompute import Recompute
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.samplers import Sampler
from lightning_draft.seeds import derive_seed


class Rewards(NamedTuple):
    """The rewards of a batch.

    Args:
        scores: `(B,)`.
        components: Scores of the reward's components by name, each `(B,)`.
        pixels: Statistics of the images by log key, each `(B,)`; empty if no images were decoded.
    """

    scores: Tensor
    components: dict[str, Tensor]
    pixels: dict[str, Tensor]


class DirectModule(RewardModule, ABC):
    """Base class of the methods that use the gradient of the reward with respect to the images.

    Each training step samples new images.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase; it must be differentiable.
        sampler: The sampler in training and in validation.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer.
        seed: Seed of all noise and random choices.
        checkpointing: Activations that the backward pass recomputes.
        micro_batch_size: Number of samples for which a graph is built at a time; by default the whole batch.

    Attributes:
        batches: Number of training steps.

    Raises:
        ConfigurationError: An option is out of range.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None,
        eval_rewards: dict[str, Reward] | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int | None,
        checkpointing: Checkpointing,
        micro_batch_size: int | None,
    ) -> None:
        super().__init__(model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed)
        if micro_batch_size is not None:
            integer_at_least("micro_batch_size", micro_batch_size, 1)
        self.checkpointing = check_checkpointing(checkpointing)
        self.micro_batch_size = micro_batch_size
        self.batches = 0

    @abstractmethod
    def gradient_steps(self) -> int:
        """Return the largest number of steps of a chain with gradient."""

    @abstractmethod
    def loss_and_logs(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, a scalar with a graph, and detached metrics.

        Args:
            prompts: The batch.
            generator: Generator of the method's random choices, the same on every process.
        """

    def setup(self, stage: str) -> None:
        """Count training steps from 0 in a new run."""
        super().setup(stage)
        if stage == "fit" and self.trainer.global_step == 0:
            self.batches = 0
        if stage == "fit" and (data := self.prompt_data) is not None:
            warn_of_large_parts((self.micro_batch_size, data.batch_size))

    def check_configuration(self) -> None:
        """Check that the reward is differentiable, and run the checks of all methods.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        check_differentiable(self.reward, type(self).__name__)
        super().check_configuration()

    def training_loss(self, prompts: list[str]) -> Tensor:
        """Sample, compute the rewards, and return the loss."""
        with self._random_state(derive_seed(self.seed, self.batches, self.global_rank)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.batches))
            loss, logs = self.loss_and_logs(prompts, generator)
        self.batches += 1
        self.log("train/reward", logs.pop("train/reward"), prog_bar=True, batch_size=len(prompts))
        self.log_dict(logs, batch_size=len(prompts))
        return loss

    def extra_state(self) -> dict[str, Any]:
        """Return the training state besides parameters, including `batches`, the number of training steps."""
        return {**super().extra_state(), "batches": self.batches}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the trained parameters, the rewards' states and the number of training steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["batches"] = self.last_step_state()["batches"]

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the number of training steps; the checkpoint of another method has none."""
        super().on_load_checkpoint(checkpoint)
        self.batches = checkpoint.get("batches", 0)

    @property
    def recompute(self) -> Recompute:
        """Activations that the backward pass of a training step recomputes."""
        automatic = self.checkpointing == "auto" and self.recomputing_steps_lowers_the_peak()
        return recomputed(self.checkpointing, automatic, self.micro_batch_size)

    def recomputing_steps_lowers_the_peak(self) -> bool:
        """Return whether the activations of a step would be stored at the same time as those of another network call.

        `checkpointing: auto` recomputes steps if so.
        """
        return self.gradient_steps() > 1

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

    def rewards(self, latents: Tensor, prompts: list[str]) -> Rewards:
        """Decode latents if the reward scores images, and compute the rewards."""

        def reward(latents: Tensor, prompts: list[str]) -> Rewards:
            """Score one micro-batch."""
            samples = self.decoded(latents)
            total, components = self.reward.breakdown(samples, prompts)
            return Rewards(check_scores(total, len(prompts), self.reward), components, out_of_range(samples.images))

        self.reward_queries += len(latents)
        size = self.micro_batch_size or len(latents)
        if size >= len(latents):
            return reward(latents, prompts)
        results = [
            checkpoint(reward, latents[i : i + size], prompts[i : i + size], use_reentrant=False)
            for i in range(0, len(latents), size)
        ]
        totals, *named = zip(*results, strict=True)
        components, pixels = ({name: torch.cat([each[name] for each in parts]) for name in parts[0]} for parts in named)
        return Rewards(torch.cat(totals), components, pixels)


def out_of_range(images: Tensor | None) -> dict[str, Tensor]:
    """Return the fraction of values outside [0, 1] of each image by log key; nothing without images."""
    if images is None:
        return {}
    return {"train/out_of_range_fraction": ((images < 0) | (images > 1)).float().flatten(1).mean(1)}
