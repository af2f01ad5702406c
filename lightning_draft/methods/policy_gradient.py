"""Policy gradients: a diffusion model as a policy whose actions are the steps of a stochastic sampler.

References:
    Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301 (DDPO).
    Fan et al., "DPOK", arXiv:2305.16381 (the KL divergence from the base model).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, PerPromptStatistics
from lightning_draft.arguments import boolean, given
from lightning_draft.chain import SamplingChain, State
from lightning_draft.kl_gate import KLGate, MovingReference
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.checks import check_dtype, check_gradient, check_sampler, check_stochastic
from lightning_draft.methods.kl_regularizer import KLRegularizer
from lightning_draft.methods.policy import Policy
from lightning_draft.methods.rollout import LogProbGradients, Minibatch, Rollout, Trajectories, repeat_prompts
from lightning_draft.methods.rollout_module import RolloutModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.objectives import PPO, Objective, PolicyBatch
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.value_baseline import ValueBaseline
from lightning_draft.windows import StepWindow


class PolicyGradientModule(RolloutModule):
    """Increase any reward, differentiable or not, by making the sampling steps of highly rewarded samples more likely.

    A rollout is collected for each batch of prompts. A training step uses one minibatch of it, with `micro_batch_size`
    samples and `timesteps_per_minibatch` stochastic steps; the whole rollout is used `inner_epochs` times. The
    Trainer's `accumulate_grad_batches` is the number of minibatches per optimizer step, usually that of a whole
    rollout. With an objective `L` of the log-probabilities of the rollout, the loss is

        L(log p_theta(x_{t-1} | x_t)) + kl_weight * mean KL(p_theta || p_ref),  p_ref = p_base without `kl_reference`.

    Images are clamped to [0, 1] before their rewards are computed. Steps without noise are not trained.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase.
        sampler: The sampler in training and in validation; it must be stochastic, `DDIM(50, eta=1)` by default.
        objective: The loss of log-probabilities; `PPO()` by default.
        advantage_estimator: Map from rewards to advantages; `PerPromptStatistics()` by default.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer; it steps once per optimizer step, `ReduceLROnPlateau` once per
            validation.
        samples_per_prompt: Number of samples for each prompt of a batch.
        inner_epochs: Number of epochs on each rollout.
        kl_weight: Weight of the KL divergence of each step from that of the base model, at least 0, with the reduction
            of the objective's log-probabilities; it costs one more network call per step.
        kl_gate: If given, only suspicious samples have a KL term: those that the trained reward ranks higher than the
            evaluation rewards do, which are then computed on every sample.
        kl_reference: If given, the reference of the KL term is replaced by the current model from time to time.
        kl_per_time: Whether the divergence of each step is multiplied by the step's length `t - s`, as in Flow-GRPO's
            code, which divides the squared distance of the means by `2 sigma_t^2` instead of `2 sigma_t^2 (t - s)`.
        micro_batch_size: Number of samples that are generated and trained on at a time; by default all. It does not
            change the rollout.
        timesteps_per_minibatch: Number of stochastic steps of a training step; by default all. With fewer, and as many
            accumulated minibatches, the update is the same and nothing needs to be recomputed.
        window: If given, noise is added only at a few steps of each rollout, and only these are trained; the others
            are sampled without noise. Validation uses the sampler at all steps.
        value_baseline: If given, what the latent before a step predicts of the advantage is subtracted from it.
        share_start_noise: Whether the samples of a prompt start from the same noise.
        checkpointing: What the backward pass recomputes: each `step`, each `block` inside the network, `both` or
            `none`; `auto` is `step` if a minibatch has several timesteps, so that one step is stored at a time.
        seed: Seed of the starting noise and of the sampler's noise, in `0..2^63 - 1`;
            by default 0, and on the command line that of `seed_everything`.

    Attributes:
        objective: The loss of log-probabilities.
        policy: The model and the sampler as a policy, without a window.

    Raises:
        ConfigurationError: An option is out of range.
    """

    objective: Objective

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
        kl_gate: KLGate | None = None,
        kl_reference: MovingReference | None = None,
        kl_per_time: bool = False,
        micro_batch_size: int | None = None,
        timesteps_per_minibatch: int | None = None,
        window: StepWindow | None = None,
        value_baseline: ValueBaseline | None = None,
        share_start_noise: bool = False,
        checkpointing: Checkpointing = "auto",
        seed: int | None = None,
    ) -> None:
        sampler = DDIM(50, eta=1.0) if sampler is None else sampler
        super().__init__(
            model,
            reward,
            sampler,
            eval_rewards,
            optimizer,
            lr_scheduler,
            seed,
            PPO() if objective is None else objective,
            PerPromptStatistics() if advantage_estimator is None else advantage_estimator,
            samples_per_prompt,
            inner_epochs,
            micro_batch_size,
            timesteps_per_minibatch,
            share_start_noise,
            checkpointing,
            KLRegularizer(kl_weight, kl_gate, kl_reference),
        )
        if boolean("kl_per_time", kl_per_time):
            self.regularizer.check_used("kl_per_time", "false")
        self.window, self.value_baseline = window, value_baseline
        self.policy = Policy(model, sampler, self.objective.reduce, micro_batch_size, kl_per_time)

    def strategies(self) -> dict[str, object]:
        """Return the strategies of the run, including the window and the value baseline."""
        return {**super().strategies(), **given(window=self.window, value_baseline=self.value_baseline)}

    def check_configuration(self) -> None:
        """Check that the sampler has log-probabilities, and that window, groups and optimizer steps suit the run.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        check_sampler(self.sampler, self.model.schedule)
        check_stochastic(self.sampler, self.policy.steps)
        self.policy_of(0)
        if self.value_baseline is not None:
            self.value_baseline.check(self.objective)
        super().check_configuration()

    def setup(self, stage: str) -> None:
        """Check the configuration before training; in a new run, the value baseline is 0."""
        super().setup(stage)
        if stage == "fit" and self.trainer.global_step == 0 and self.value_baseline is not None:
            self.value_baseline.statistics = {}

    def extra_state(self) -> dict[str, Any]:
        """Return the training state besides parameters, including `value_baseline`, its statistics."""
        baseline = self.value_baseline
        return {**super().extra_state(), "value_baseline": {} if baseline is None else baseline.statistics}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also save the value baseline."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["value_baseline"] = ValueBaseline.state_dict(self.last_step_state()["value_baseline"])

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the value baseline."""
        super().on_load_checkpoint(checkpoint)
        if self.value_baseline is not None:
            self.value_baseline.load_state_dict(checkpoint.get("value_baseline", {}))

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check on one sampling step that the gradient of its log-probability reaches the trainable parameters.

        The random state, the parameters and their gradients are not changed.

        Raises:
            ConfigurationError: The gradient is missing, zero or not finite.
        """
        check_dtype(self.trainable_parameters())
        with self.first_step_context():
            conditioning = self.model.encode(prompts)
            chain = SamplingChain(self.model, self.sampler, conditioning, recompute=self.recompute)
            mean = chain.transition(State(self.model.noise(len(prompts)), self.policy.steps[-1])).mean
            if self.gradients_are_complete:
                value = (mean * torch.randn_like(mean)).sum()
                check_gradient(value, self.trainable_parameters().values(), "log-probability")

    def rollout_timesteps(self) -> int:
        """Return the number of stochastic steps of a rollout."""
        return len(self.policy.steps) if self.window is None else self.window.size

    def policy_of(self, number: int) -> Policy:
        """Return the policy of rollout `number`, which adds noise only in its window."""
        if self.window is None:
            return self.policy
        return self.policy.within(self.window.steps(number, self.policy.steps, self.seed))

    def sample_rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None, number: int
    ) -> Trajectories:
        """Return latents `(T + 1, N, ...)` from noise to sample, log-probabilities, and means if they are needed."""
        return self.policy_of(number).sample(prompts, seeds, start_seeds, self.objective.needs_old_means)

    def collect_rollout(self, prompts: Sequence[str], number: int = 0, step: int = 0) -> Rollout:
        """Collect a rollout, with the base model's log-probabilities if the objective needs them."""
        rollout = super().collect_rollout(prompts, number, step)
        if self.window is not None:
            start = float(self.policy_of(number).steps[0])
            rollout = replace(rollout, summary={**rollout.summary, "train/window_start": start})
        if self.value_baseline is not None:
            steps, plain = self.policy_of(number).steps, rollout.advantages
            advantages, explained = self.value_baseline.step_advantages(rollout.latents[steps], plain, steps)
            summary = {**rollout.summary, "train/value_explained": explained}
            rollout = replace(rollout, step_advantages=advantages, summary=summary)
        if not self.objective.needs_reference:
            return rollout
        with self.model.base():
            every = repeat_prompts(prompts, self.samples_per_prompt)
            return replace(rollout, ref_log_probs=self.policy_of(number).log_probs(every, rollout.latents))

    def minibatch_loss(
        self, prompts: Sequence[str], rollout: Rollout, minibatch: Minibatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch of the current rollout, and metrics."""
        gradients, step = None, self.trainer.global_step
        if not self.objective.separable:
            gradients = self.buffer.log_prob_gradients(
                step, lambda: self.log_prob_gradients(prompts, rollout, moved=rollout.step != step)
            )
        return self.loss_and_logs(prompts, rollout, minibatch, gradients)

    def loss_and_logs(
        self,
        prompts: Sequence[str],
        rollout: Rollout,
        minibatch: Minibatch,
        gradients: LogProbGradients | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss averaged over a minibatch of a rollout, a scalar with a graph, and detached metrics.

        Args:
            prompts: The batch that the rollout was collected for.
            rollout: From `collect_rollout`.
            minibatch: One of `minibatches`.
            gradients: From `log_prob_gradients`, if the objective is not separable.
        """
        some = repeat_prompts(prompts, self.samples_per_prompt)[minibatch.samples]
        policy, latents = self.policy_of(rollout.number), rollout.latents[:, minibatch.samples]
        steps = policy.steps[minibatch.steps]
        old_means = None if rollout.old_means is None else rollout.old_means[minibatch.steps, minibatch.samples]
        reference = self.regularizer.reference_model(self.model, self.trainable_parameters())
        log_probs, kl, change = policy.evaluate(some, latents, steps, reference, old_means, self.recompute)
        batch = self._policy_batch(log_probs, rollout, minibatch.samples, minibatch.steps)
        batch = replace(batch, change=change)
        if gradients is None:
            loss = self.objective(batch)
        else:
            loss = (gradients.weights[minibatch.steps, minibatch.samples] * log_probs).sum() / minibatch.fraction
        log_ratio = (log_probs - batch.old_log_probs).detach()
        policy_loss = loss.detach() if gradients is None else gradients.loss
        logs = {
            "train/loss": policy_loss,
            "train/ratio": log_ratio.exp().mean(),
            "train/approx_kl": (log_ratio.expm1() - log_ratio).mean(),
            "train/clip_fraction": self.objective.clipped(batch).float().mean(),
        }
        if change is not None:
            logs["train/old_kl"] = change.kl.detach().mean()
        if kl is None:
            return loss, logs
        gate = None if rollout.kl_gate is None else rollout.kl_gate[minibatch.samples]
        penalty = self.regularizer.penalty(kl, gate)
        logs |= {"train/loss": policy_loss + penalty.detach(), "train/policy_loss": policy_loss}
        return loss + penalty, {**logs, "train/kl": kl.detach().mean()}

    def log_prob_gradients(self, prompts: Sequence[str], rollout: Rollout, moved: bool = True) -> LogProbGradients:
        """Return the objective's gradient with respect to all log-probabilities of a rollout, without a network graph.

        Args:
            prompts: The batch that the rollout was collected for.
            rollout: From `collect_rollout`.
            moved: Whether the model has changed since; if not, the rollout's own log-probabilities are used.
        """
        whole, every = slice(None), repeat_prompts(prompts, self.samples_per_prompt)
        policy = self.policy_of(rollout.number)
        log_probs = policy.log_probs(every, rollout.latents) if moved else rollout.log_probs
        leaf = log_probs.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = self.objective(self._policy_batch(leaf, rollout, whole, whole))
        return LogProbGradients(torch.autograd.grad(loss, leaf)[0], loss.detach())

    def _policy_batch(self, log_probs: Tensor, rollout: Rollout, some: slice, few: slice) -> PolicyBatch:
        reference = None if rollout.ref_log_probs is None else rollout.ref_log_probs[few, some]
        old, each = rollout.log_probs[few, some], rollout.step_advantages
        advantages = rollout.advantages[some] if each is None else each[few, some]
        return PolicyBatch(log_probs, old, advantages, self.samples_per_prompt, reference)
