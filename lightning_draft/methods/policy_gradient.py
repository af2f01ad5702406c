"""Policy gradients: a diffusion model as a policy whose actions are the steps of a stochastic sampler.

References:
    Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301 (DDPO).
    Fan et al., "DPOK", arXiv:2305.16381 (the KL to the base).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, PerPromptStatistics
from lightning_draft.arguments import one_of
from lightning_draft.chain import Recompute, SamplingChain, State
from lightning_draft.data import PromptDataModule
from lightning_draft.distributed import all_gather_objects, world_size
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.checks import (
    check_accumulation,
    check_dtype,
    check_gradient,
    check_group_size,
    check_stochastic,
)
from lightning_draft.methods.rollout import (
    LogProbGradients,
    Minibatch,
    Policy,
    Rollout,
    minibatches,
    slices,
    summarise,
)
from lightning_draft.models.base import DiffusionModel
from lightning_draft.objectives import PPO, Objective, PolicyBatch
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.seeds import derive_seed


class PolicyGradientModule(RewardModule):
    """Raise any reward, differentiable or not, by making the steps of well rewarded samples more likely.

    A rollout is drawn from each batch of prompts and trained on part by part, one part a training step: of its samples
    `micro_batch_size` at a time, of its stochastic steps `timesteps_per_minibatch`, all of it `inner_epochs` times. The
    Trainer's `accumulate_grad_batches` says how many parts make an optimiser step: those of one pass are the usual
    choice. Pictures are clamped to [0, 1] before they are rewarded. A step without noise has no log-probability and is
    not trained.

    Args:
        model: The diffusion model, with its adapters.
        reward: What to raise.
        sampler: How images are sampled, in training and in validation; it must be stochastic, `DDIM(50, eta=1)` by
            default.
        objective: The loss of log-probabilities; `PPO()` by default.
        advantage_estimator: From rewards to advantages; `PerPromptStatistics()` by default.
        eval_rewards: Rewards that are reported on validation images and never trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once an optimisation step.
        samples_per_prompt: How many samples are drawn for each prompt of a batch.
        inner_epochs: How often a rollout is trained on.
        kl_weight: Weight of the KL divergence of each step from the base model's, reduced as the objective's
            log-probabilities; it costs one more network call a step.
        micro_batch_size: Draw and train this many samples at a time; by default all. It changes no rollout.
        timesteps_per_minibatch: Train this many sampling steps at a time; by default all. Memory follows it.
        checkpointing: `block` recomputes each block inside the network in the backward pass, `none` nothing.
        seed: Of the starting noise and of the sampler's.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        objective: Objective | None = None,
        advantage_estimator: AdvantageEstimator | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        samples_per_prompt: int = 1,
        inner_epochs: int = 1,
        kl_weight: float = 0.0,
        micro_batch_size: int | None = None,
        timesteps_per_minibatch: int | None = None,
        checkpointing: Literal["none", "block"] = "none",
        seed: int = 0,
    ) -> None:
        sampler = DDIM(50, eta=1.0) if sampler is None else sampler
        super().__init__(model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed)
        if kl_weight < 0:
            raise ConfigurationError(f"kl_weight={kl_weight} must not be negative")
        sizes = {
            "samples_per_prompt": samples_per_prompt,
            "inner_epochs": inner_epochs,
            "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size,
            "timesteps_per_minibatch": 1 if timesteps_per_minibatch is None else timesteps_per_minibatch,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigurationError(f"{name}={size} must be at least 1")
        self.objective = PPO() if objective is None else objective
        self.advantage_estimator = PerPromptStatistics() if advantage_estimator is None else advantage_estimator
        self.samples_per_prompt = samples_per_prompt
        self.inner_epochs = inner_epochs
        self.kl_weight = kl_weight
        self.micro_batch_size = micro_batch_size
        self.timesteps_per_minibatch = timesteps_per_minibatch
        self.recompute = Recompute(blocks=one_of("checkpointing", checkpointing, ("none", "block")) == "block")
        model.checkpoint_blocks(self.recompute.blocks)
        self.rollout: Rollout | None = None
        self._unused = 0  # parts of the rollout that are still to be trained on
        self._derived: tuple[int, LogProbGradients] | None = None
        self._logged: tuple[int, dict[str, Tensor]] = (-1, {})  # by which optimiser step, and sums over its parts

    @property
    def method(self) -> Objective:
        """The objective."""
        return self.objective

    def setup(self, stage: str) -> None:
        """Check the configuration before a fit, and drop the rollout of an earlier one."""
        super().setup(stage)
        if stage == "fit":
            self.rollout = self._derived = None

    def check_configuration(self) -> None:
        """Check that the sampler has log-probabilities, and that groups and optimizer steps fit the objective.

        Raises:
            ConfigurationError: One of them does not hold.
        """
        super().check_configuration()
        check_stochastic(self.sampler, self.policy.steps)
        check_group_size(self.samples_per_prompt, (self.objective, self.advantage_estimator))
        datamodule = self.trainer.datamodule
        if isinstance(datamodule, PromptDataModule):
            self.check_accumulation(datamodule.batch_size)

    def check_accumulation(self, batch_size: int) -> None:
        """Check that the Trainer's optimizer steps end where minibatches, epochs or rollouts do.

        Raises:
            ConfigurationError: They do not, as the objective needs it.
        """
        minibatches = len(self.minibatches(batch_size))
        check_accumulation(self.objective, self.trainer.accumulate_grad_batches, minibatches, self.inner_epochs)

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check on one sampling step that the gradient of its log-probability reaches what is trained.

        The random state, the parameters and their gradients are left as they were.

        Raises:
            ConfigurationError: The gradient is missing, zero or not finite.
        """
        check_dtype(self.trainable_parameters())
        with self.first_step_context():
            chain = SamplingChain(self.model, self.sampler, self.model.encode(prompts))
            mean = chain.transition(State(self.model.noise(len(prompts)), self.policy.steps[-1])).mean
            if self.gradients_are_whole:
                value = (mean * torch.randn_like(mean)).sum()
                check_gradient(value, self.trainable_parameters().values(), "log-probability")

    def minibatches(self, batch_size: int) -> list[Minibatch]:
        """The minibatches of one pass over the rollout of a batch."""
        samples = batch_size * self.samples_per_prompt
        return minibatches(samples, len(self.policy.steps), self.micro_batch_size, self.timesteps_per_minibatch)

    def training_steps_per_batch(self, batch_size: int) -> int:
        """How many training steps in a row are given the same batch: those that its rollout is trained on."""
        return self.inner_epochs * len(self.minibatches(batch_size))

    @property
    def policy(self) -> Policy:
        """The model and the sampler, as what draws trajectories and knows how likely they are."""
        return Policy(self.model, self.sampler, self.objective.reduce, self.micro_batch_size, self.recompute)

    def training_step(self, prompts: Sequence[str], batch_idx: int) -> Tensor:
        """Draw a rollout where none is left, and return the loss of its next part."""
        position = self.trainer.fit_loop.epoch_loop.total_batch_idx
        number, index = divmod(position, self.training_steps_per_batch(len(prompts)))
        rollout = self._current(prompts, number)
        self._unused = self.training_steps_per_batch(len(prompts)) - index - 1
        every = self.minibatches(len(prompts))
        minibatch = every[index % len(every)]
        loss, logs = self.loss_and_logs(prompts, rollout, minibatch, self._derivatives(prompts, rollout))
        scalars: dict[str, Any] = {**self._averaged(logs, minibatch.fraction), **rollout.summary}
        self.log("train/reward", scalars.pop("train/reward"), prog_bar=True, batch_size=len(prompts))
        self.log_dict(scalars, batch_size=len(prompts))
        # Lightning averages over the parts of an optimiser step; each counts by its share.
        return loss * minibatch.fraction * len(every)

    def loss_and_logs(
        self,
        prompts: Sequence[str],
        rollout: Rollout,
        minibatch: Minibatch,
        derivatives: LogProbGradients | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss averaged over a part of a rollout, scalar with a graph, and what to log of it, detached.

        Args:
            prompts: The batch that the rollout was drawn from.
            rollout: From `collect_rollout`.
            minibatch: One of `minibatches`.
            derivatives: From `log_prob_gradients`, where the objective is not separable.
        """
        some, steps = self._repeated(prompts)[minibatch.samples], self.policy.steps[minibatch.steps]
        latents = rollout.latents[:, minibatch.samples]
        log_probs, divergence = self.policy.evaluate(some, latents, steps, diverge=self.kl_weight > 0)
        batch = self._evidence(log_probs, rollout, minibatch.samples, minibatch.steps)
        if derivatives is None:
            loss = self.objective(batch)
        else:
            loss = (derivatives.weights[minibatch.steps, minibatch.samples] * log_probs).sum() / minibatch.fraction
        log_ratio = (log_probs - batch.old_log_probs).detach()
        logs = {
            "train/loss": loss.detach() if derivatives is None else derivatives.loss,
            "train/ratio": log_ratio.exp().mean(),
            "train/approx_kl": (log_ratio.expm1() - log_ratio).mean(),
            "train/clip_fraction": self.objective.clipped(batch).float().mean(),
        }
        if divergence is not None:
            loss = loss + self.kl_weight * divergence
            logs["train/kl"] = divergence.detach()
        return loss, logs

    def log_prob_gradients(self, prompts: Sequence[str], rollout: Rollout, moved: bool = True) -> LogProbGradients:
        """The objective's derivatives with respect to all log-probabilities of a rollout, without a network's graph.

        Args:
            prompts: The batch that the rollout was drawn from.
            rollout: From `collect_rollout`.
            moved: Whether the model has changed since; if it has not, the rollout's own log-probabilities are used.
        """
        whole = slice(None)
        log_probs = rollout.log_probs
        if moved:
            log_probs = self.policy.log_probs(self._repeated(prompts), rollout.latents)
        leaf = log_probs.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = self.objective(self._evidence(leaf, rollout, whole, whole))
        return LogProbGradients(torch.autograd.grad(loss, leaf)[0], loss.detach())

    @torch.no_grad()
    def collect_rollout(self, prompts: Sequence[str], number: int = 0, step: int = 0) -> Rollout:
        """Sample `samples_per_prompt` trajectories a prompt and reward them.

        Args:
            prompts: The batch.
            number: Which rollout of the run it is; the noise depends on it, the seed, the process and the sample alone.
            step: How many optimiser steps the model has behind it.
        """
        every = self._repeated(prompts)
        seeds = [derive_seed(self.seed, number, self.global_rank, i) for i in range(len(every))]
        with self._random_state(derive_seed(self.seed, number, self.global_rank)):
            latents, log_probs = self.policy.sample(every, seeds)
            pieces = slices(len(every), self.micro_batch_size)
            scores = [self._judge(latents[-1, some], every[some]) for some in pieces]
        rewards = torch.cat([total for total, _ in scores])
        advantages = self._advantages(rewards, every)
        names = [str(prompt) for prompt in every]
        summary = summarise(rewards, advantages, self.samples_per_prompt)
        judged = {name: torch.cat([inner[name] for _, inner in scores]) for name in scores[0][1]}
        self.update_statistics(judged)
        summary |= {f"train/reward/{name}": float(part.mean()) for name, part in judged.items()}
        rollout = Rollout(number, step, names, latents, log_probs, rewards, advantages, summary)
        if not self.objective.needs_reference:
            return rollout
        with self.model.base():
            return replace(rollout, ref_log_probs=self.policy.log_probs(every, latents))

    def extra_state(self) -> dict[str, Any]:
        """What training changes besides parameters: the baseline and the rollout that is not used up, too."""
        left = self.rollout if self._unused else None
        return {**super().extra_state(), "advantage_estimator": self.advantage_estimator.state_dict(), "rollout": left}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, the baseline, and of every process the rollout that is not used up."""
        super().on_save_checkpoint(checkpoint)
        memory = self.last_step_state()
        left = memory["rollout"]
        checkpoint["advantage_estimator"] = memory["advantage_estimator"]
        checkpoint["rollouts"] = all_gather_objects(None if left is None else left.to("cpu").state_dict())

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on with the rollout that was not used up; other numbers of processes draw a new one."""
        super().on_load_checkpoint(checkpoint)
        self.advantage_estimator.load_state_dict(checkpoint.get("advantage_estimator", {}))
        saved, size = checkpoint.get("rollouts"), world_size()
        if saved is None:  # of a method without rollouts
            return
        if len(saved) != size:
            rank_zero_warn(
                f"the checkpoint is of {len(saved)} processes and there are {size} now: the rollout is drawn anew, and "
                "this run will differ from the uninterrupted one"
            )
        elif saved[self.global_rank] is not None:
            self.rollout, self._unused = Rollout(**saved[self.global_rank]), 1

    def _current(self, prompts: Sequence[str], number: int) -> Rollout:
        """The rollout with this number, drawn unless it is there."""
        step = self.trainer.global_step
        if self.rollout is None or self.rollout.number != number:
            self.check_accumulation(len(prompts))
            self.rollout, self._derived = self.collect_rollout(prompts, number, step), None
        if self.rollout.prompts != [str(prompt) for prompt in self._repeated(prompts)]:
            raise ConfigurationError(
                f"a rollout is trained on for {self.training_steps_per_batch(len(prompts))} training steps, and the "
                "prompts changed before that; use PromptDataModule, or a loader that repeats each batch that often"
            )
        if self.objective.on_policy and self._unused and self.rollout.step < step:
            raise ConfigurationError(
                f"the Trainer made an optimiser step before a rollout was used up, and {type(self.objective).__name__} "
                "is on-policy; leave out limit_train_batches, or make it a multiple of accumulate_grad_batches"
            )
        self.rollout = self.rollout.to(self.device)
        return self.rollout

    def _derivatives(self, prompts: Sequence[str], rollout: Rollout) -> LogProbGradients | None:
        """Those of this optimiser step, where the objective takes two passes."""
        if self.objective.separable:
            return None
        step = self.trainer.global_step
        if self._derived is None or self._derived[0] != step:
            self._derived = step, self.log_prob_gradients(prompts, rollout, moved=rollout.step != step)
        return self._derived[1]

    def _evidence(self, log_probs: Tensor, rollout: Rollout, some: slice, few: slice) -> PolicyBatch:
        reference = None if rollout.ref_log_probs is None else rollout.ref_log_probs[few, some]
        old, advantages = rollout.log_probs[few, some], rollout.advantages[some]
        return PolicyBatch(log_probs, old, advantages, self.samples_per_prompt, reference)

    def _judge(self, latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores `(B,)` of the pictures, and their parts."""
        self.reward_queries += len(prompts)
        images = self.model.decode(latents).float().clamp(0, 1)
        total, inner = self.reward.breakdown(images, prompts)
        check_scores(total, len(prompts), self.reward)
        odd = [prompt for prompt, score in zip(prompts, total, strict=True) if not score.isfinite()]
        if odd:
            raise ValueError(f"{type(self.reward).__name__} gave a score that is not finite for {', '.join(odd)}")
        return total.float(), inner

    def _advantages(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """This process's, from a baseline that sees the rewards of all."""
        every = all_gather_objects((rewards.cpu(), [str(prompt) for prompt in prompts]))
        names = [name for _, prompts in every for name in prompts]
        advantages = self.advantage_estimator(
            torch.cat([rewards for rewards, _ in every]), names, self.samples_per_prompt
        )
        start = sum(len(prompts) for _, prompts in every[: self.global_rank])
        return advantages[start : start + len(prompts)].to(rewards)

    def _averaged(self, logs: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
        """Means over the parts of this optimiser step so far, each counted by its share."""
        step, sums = self._logged
        sums = sums if step == self.trainer.global_step else {}
        for name, value in {"fraction": torch.ones(()), **logs}.items():
            sums[name] = sums.get(name, 0) + fraction * value
        self._logged = self.trainer.global_step, sums
        return {name: sums[name] / sums["fraction"] for name in logs}

    def _repeated(self, prompts: Sequence[str]) -> list[str]:
        """Every prompt `samples_per_prompt` times in a row."""
        return [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
