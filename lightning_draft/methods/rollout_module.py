"""Base class of methods that train on rollouts: rewards, advantages, the rollout buffer and its checkpoints."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator
from lightning_draft.arguments import at_least
from lightning_draft.distributed import all_gather_objects, world_size
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.rollout import RolloutBuffer
from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.rewards.inputs import check_finite
from lightning_draft.samplers import Sampler


class RolloutModule(RewardModule, ABC):
    """Base class of the methods that collect rollouts and train on each for several steps.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase.
        sampler: The sampler in training and in validation.
        eval_rewards: Rewards that are only reported, on validation images, by name.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer.
        seed: Seed of all noise.
        advantage_estimator: From rewards to advantages.
        samples_per_prompt: Number of samples for each prompt of a batch.

    Attributes:
        buffer: The current rollout and the position in it.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None,
        eval_rewards: dict[str, Reward] | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int,
        advantage_estimator: AdvantageEstimator,
        samples_per_prompt: int,
    ) -> None:
        super().__init__(model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed)
        self.advantage_estimator = advantage_estimator
        self.samples_per_prompt = at_least("samples_per_prompt", samples_per_prompt, 1)
        self.buffer = RolloutBuffer()

    def setup(self, stage: str) -> None:
        """Check the configuration before a fit, and start at the first rollout in a new run."""
        super().setup(stage)
        if stage == "fit":
            self.buffer.drop_rollout()
            if self.trainer.global_step == 0:
                self.buffer.reset()

    def strategies(self) -> dict[str, object]:
        """Return what the run consists of, with the advantage estimator."""
        return {**super().strategies(), "advantage_estimator": self.advantage_estimator}

    def score_samples(self, latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores `(B,)` of samples, and those of the reward's components.

        Args:
            latents: `(B, ...)`.
            prompts: `B` prompts.

        Raises:
            NonFiniteScoreError: A score is not finite.
        """
        self.reward_queries += len(prompts)
        images = self.model.decode(latents).float().clamp(0, 1)
        total, components = self.reward.breakdown(images, prompts)
        scores = check_scores(total, len(prompts), self.reward)
        return check_finite(scores, images, prompts, self.reward).float(), components

    def advantages(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return this process's advantages `(B,)`, from an estimator that receives the rewards of all processes.

        Args:
            rewards: `(B,)`.
            prompts: `B` prompts.
        """
        gathered = all_gather_objects((rewards.cpu(), [str(prompt) for prompt in prompts]))
        names = [name for _, prompts in gathered for name in prompts]
        everything = torch.cat([rewards for rewards, _ in gathered])
        advantages = self.advantage_estimator(everything, names, self.samples_per_prompt)
        start = sum(len(prompts) for _, prompts in gathered[: self.global_rank])
        return advantages[start : start + len(prompts)].to(rewards)

    def extra_state(self) -> dict[str, Any]:
        """Return what training changes besides parameters: also `rollout`, the position in the rollout."""
        return {**super().extra_state(), "rollout": self.buffer.extra_state()}

    def mark_step(self) -> None:
        """Keep the state after the last optimizer step, that of the advantage estimator too."""
        super().mark_step()
        self.advantage_estimator.mark()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, the advantage estimator, and each process's rollout if it is not used up."""
        super().on_save_checkpoint(checkpoint)
        estimator = self.advantage_estimator
        checkpoint["advantage_estimator"] = estimator.marked_state() if self.is_within_step else estimator.state_dict()
        checkpoint["rollouts"] = all_gather_objects(RolloutBuffer.state_dict(self.last_step_state()["rollout"]))

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue with the rollout that was not used up; another number of processes collects it again."""
        super().on_load_checkpoint(checkpoint)
        self.advantage_estimator.load_state_dict(checkpoint.get("advantage_estimator", {}))
        saved, size = checkpoint.get("rollouts"), world_size()
        if saved is None:  # of a method without rollouts
            return
        if len(saved) == size:
            self.buffer.load_state_dict(saved[self.global_rank])
            return
        self.buffer.load_state_dict({**saved[0], "rollout": None})
        rank_zero_warn(
            f"the checkpoint is of {len(saved)} processes and there are {size} now: the rollout is collected again, "
            "and this run will differ from the uninterrupted one"
        )
