"""Base class of methods that train on rollouts: rewards, advantages, minibatches, the rollout buffer, checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator
from lightning_draft.arguments import boolean, given, integer_at_least
from lightning_draft.distributed import all_gather_objects, check_not_sharded
from lightning_draft.methods import checks
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.checkpointing import Checkpointing, check_checkpointing, recomputed
from lightning_draft.methods.kl_regularizer import KLRegularizer
from lightning_draft.methods.rollout import (
    Minibatch,
    Rollout,
    RolloutBuffer,
    SampleScores,
    Trajectories,
    concatenate,
    minibatches,
    repeat_prompts,
    rollout_seeds,
    slices,
    summarize,
)
from lightning_draft.methods.rollout_advantages import compared_features, compares_images, rollout_advantages
from lightning_draft.models.base import DiffusionModel
from lightning_draft.objectives import RolloutObjective
from lightning_draft.recompute import Recompute
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.rewards.inputs import check_finite
from lightning_draft.samplers import Sampler
from lightning_draft.seeds import derive_seed


class RolloutModule(RewardModule, ABC):
    """Base class of the methods that collect rollouts and train on each for several steps.

    A rollout is collected for each batch of prompts. A training step uses one minibatch of it, with `micro_batch_size`
    samples and `timesteps_per_minibatch` timesteps; the whole rollout is used `inner_epochs` times. The Trainer's
    `accumulate_grad_batches` is the number of minibatches per optimizer step.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase.
        sampler: The sampler in training and in validation.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer.
        seed: Seed of all noise.
        objective: The loss of a minibatch.
        advantage_estimator: Map from rewards to advantages.
        samples_per_prompt: Number of samples for each prompt of a batch.
        inner_epochs: Number of epochs on each rollout.
        micro_batch_size: Number of samples that are generated and trained on at a time; by default all.
        timesteps_per_minibatch: Number of timesteps that are trained on at a time; by default all.
        share_start_noise: Whether the samples of a prompt start from the same noise.
        checkpointing: Activations that the backward pass recomputes.
        regularizer: The KL term.

    Attributes:
        buffer: The current rollout and the position in it.

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
        objective: RolloutObjective,
        advantage_estimator: AdvantageEstimator,
        samples_per_prompt: int,
        inner_epochs: int,
        micro_batch_size: int | None,
        timesteps_per_minibatch: int | None,
        share_start_noise: bool,
        checkpointing: Checkpointing,
        regularizer: KLRegularizer,
    ) -> None:
        super().__init__(model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed)
        self.objective = objective
        self.advantage_estimator = advantage_estimator
        self.samples_per_prompt = integer_at_least("samples_per_prompt", samples_per_prompt, 1)
        self.inner_epochs = integer_at_least("inner_epochs", inner_epochs, 1)
        self.micro_batch_size = (
            None if micro_batch_size is None else integer_at_least("micro_batch_size", micro_batch_size, 1)
        )
        few = timesteps_per_minibatch
        self.timesteps_per_minibatch = None if few is None else integer_at_least("timesteps_per_minibatch", few, 1)
        self.share_start_noise = boolean("share_start_noise", share_start_noise)
        self.checkpointing = check_checkpointing(checkpointing)
        self.regularizer = regularizer
        self.buffer = RolloutBuffer()

    @abstractmethod
    def rollout_timesteps(self) -> int:
        """Return the number of trained timesteps of each sample."""

    @abstractmethod
    def sample_rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None, number: int
    ) -> Trajectories:
        """Sample without a graph.

        Args:
            prompts: `N` prompts.
            seeds: `N` seeds, one for all noise of a sample.
            start_seeds: Seeds of the starting noise, if they differ.
            number: Number of the rollout.
        """

    @abstractmethod
    def minibatch_loss(
        self, prompts: Sequence[str], rollout: Rollout, minibatch: Minibatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss averaged over a minibatch of the current rollout, with a graph, and detached metrics."""

    @property
    def method(self) -> RolloutObjective:
        """The objective."""
        return self.objective

    @property
    def recompute(self) -> Recompute:
        """Activations that the backward pass of a training step recomputes."""
        total = self.rollout_timesteps()
        return recomputed(self.checkpointing, min(self.timesteps_per_minibatch or total, total) > 1)

    def setup(self, stage: str) -> None:
        """Check the configuration before training; a new run starts at the first rollout without statistics."""
        super().setup(stage)
        if stage == "fit":
            self.buffer.drop_rollout()
            if self.trainer.global_step == 0:
                self.buffer.reset()
                self.regularizer.load_state_dict({})
                self.advantage_estimator.load_state_dict({})

    def strategies(self) -> dict[str, object]:
        """Return the strategies of the run, including the advantage estimator and those of the KL term."""
        kl = given(kl_gate=self.regularizer.gate, kl_reference=self.regularizer.reference)
        return {**super().strategies(), "advantage_estimator": self.advantage_estimator, **kl}

    def check_configuration(self) -> None:
        """Check that groups and optimizer steps suit the objective.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        super().check_configuration()
        checks.check_group_size(self.samples_per_prompt, (self.objective, self.advantage_estimator))
        checks.check_comparisons(self.reward, self.advantage_estimator)
        self.regularizer.check(self.eval_reward_names)
        if self.regularizer.reference is not None:
            check_not_sharded("kl_reference", self._trainer)
        if (data := self.prompt_data) is not None:
            self.check_accumulation(data.batch_size)
            samples = data.batch_size * self.samples_per_prompt
            steps = self.timesteps_per_minibatch, self.rollout_timesteps()
            checks.warn_of_large_parts((self.micro_batch_size, samples), steps)

    def check_accumulation(self, batch_size: int) -> None:
        """Check that the Trainer's optimizer steps end with minibatches, epochs or rollouts as the objective requires.

        Raises:
            ConfigurationError: An optimizer step ends elsewhere.
        """
        number = len(self.minibatches(batch_size))
        checks.check_accumulation(self.objective, self.trainer.accumulate_grad_batches, number, self.inner_epochs)

    def minibatches(self, batch_size: int) -> list[Minibatch]:
        """Return the minibatches of one epoch over the rollout of a batch."""
        samples = batch_size * self.samples_per_prompt
        return minibatches(samples, self.rollout_timesteps(), self.micro_batch_size, self.timesteps_per_minibatch)

    def training_steps_per_batch(self, batch_size: int) -> int:
        """Return the number of training steps on a rollout, which all need the same batch of prompts."""
        return self.inner_epochs * len(self.minibatches(batch_size))

    def training_loss(self, prompts: list[str]) -> Tensor:
        """Return the loss of the next minibatch of the rollout, which is collected if there is none."""
        step = self.trainer.global_step
        every = self.minibatches(len(prompts))
        minibatch = every[self.buffer.index % len(every)]
        rollout = self._current_rollout(prompts, step)
        loss, logs = self.minibatch_loss(prompts, rollout, minibatch)
        self.buffer.advance(self.training_steps_per_batch(len(prompts)))
        scalars: dict[str, Any] = {**self.buffer.averages(logs, minibatch.fraction, step), **rollout.summary}
        self.regularizer.record_kl(scalars.get("train/kl"))
        self.log("train/reward", scalars.pop("train/reward"), prog_bar=True, batch_size=len(prompts))
        self.log_dict(scalars, batch_size=len(prompts))
        # Lightning averages over the minibatches of an optimizer step; each is weighted by its fraction.
        return loss * minibatch.fraction * len(every)

    @torch.no_grad()
    def collect_rollout(self, prompts: Sequence[str], number: int = 0, step: int = 0) -> Rollout:
        """Generate `samples_per_prompt` images per prompt and compute their rewards.

        Args:
            prompts: The batch.
            number: Number of the rollout in the run; noise depends only on it, the seed, the process and the sample.
            step: Number of finished optimizer steps.
        """
        self.regularizer.start_rollout(self.trainable_parameters())
        every = repeat_prompts(prompts, self.samples_per_prompt)
        seeds, starts = rollout_seeds(self.seed, number, self.global_rank, len(every), self.samples_per_prompt)
        with self._random_state(derive_seed(self.seed, number, self.global_rank)):
            latents, log_probs, means = self.sample_rollout(
                every, seeds, starts if self.share_start_noise else None, number
            )
            parts = slices(len(every), self.micro_batch_size)
            scores = concatenate([self.score_samples(latents[-1, some], every[some]) for some in parts])
        advantages = rollout_advantages(
            self.advantage_estimator,
            self.reward,
            scores.rewards,
            every,
            self.samples_per_prompt,
            self.global_rank,
            scores.features,
        )
        self.update_statistics(scores.components)
        gate, logs = self.regularizer.select(scores.rewards, scores.evaluated, self.global_rank)
        summary = {**summarize(scores.rewards, advantages, self.samples_per_prompt), **logs}
        summary |= {f"train/reward/{name}": float(values.mean()) for name, values in scores.components.items()}
        names = [str(prompt) for prompt in every]
        return Rollout(
            number, step, names, latents, log_probs, scores.rewards, advantages, summary, old_means=means, kl_gate=gate
        )

    def score_samples(self, latents: Tensor, prompts: Sequence[str]) -> SampleScores:
        """Return the scores of samples `(B, ...)`.

        Raises:
            NonFiniteScoreError: A score is not finite.
        """
        self.reward_queries += len(prompts)
        names = self.regularizer.gate_rewards(self.eval_reward_names)
        compares = compares_images(self.advantage_estimator, self.reward)
        samples = self.decoded(latents, names, compares).clamped()
        total, components = self.reward.breakdown(samples, prompts)
        scores = check_finite(check_scores(total, len(prompts), self.reward), samples.content, prompts, self.reward)
        features = compared_features(self.advantage_estimator, samples.content) if compares else None
        return SampleScores(scores.float(), components, self.eval_scores(samples, prompts, names), features)

    def extra_state(self) -> dict[str, Any]:
        """Return the training state besides parameters, including `rollout`, the position in the rollout."""
        return {**super().extra_state(), "rollout": self.buffer.extra_state(), "kl": self.regularizer.state}

    def mark_step(self) -> None:
        """Mark the state after the last optimizer step, including that of the advantage estimator."""
        super().mark_step()
        self.advantage_estimator.mark()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the trained parameters, the advantage estimator's state, and each process's rollout if it is needed."""
        super().on_save_checkpoint(checkpoint)
        estimator = self.advantage_estimator
        checkpoint["advantage_estimator"] = estimator.marked_state() if self.is_within_step else estimator.state_dict()
        state = self.last_step_state()
        checkpoint["rollouts"] = all_gather_objects(RolloutBuffer.state_dict(state["rollout"]))
        checkpoint["kl"] = self.regularizer.state_dict(state["kl"])

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the rollout that is still needed; with another number of processes it is collected again."""
        super().on_load_checkpoint(checkpoint)
        self.advantage_estimator.load_state_dict(checkpoint.get("advantage_estimator", {}))
        self.regularizer.load_state_dict(checkpoint.get("kl", {}))
        if "rollouts" in checkpoint:  # not of a method without rollouts
            self.buffer.restore(checkpoint["rollouts"], self.global_rank)

    def _current_rollout(self, prompts: Sequence[str], step: int) -> Rollout:
        """Return the rollout to train on.

        Raises:
            ConfigurationError: The rollout is of other prompts, or must not be used for another optimizer step.
        """

        def collect(number: int) -> Rollout:
            self.check_accumulation(len(prompts))
            return self.collect_rollout(prompts, number, step)

        rollout = self.buffer.current(self.device, collect)
        every = repeat_prompts(prompts, self.samples_per_prompt)
        checks.check_same_prompts(rollout.prompts, every, self.training_steps_per_batch(len(prompts)))
        if self.buffer.index and rollout.step < step:
            checks.check_reuse(self.objective)
        return rollout
