"""Fine-tuning with the forward process: add noise to the model's own samples, and train a denoising loss on them.

References:
    Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv:2509.16117.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, GroupRelative
from lightning_draft.chain import SamplingChain
from lightning_draft.distributed import check_not_sharded
from lightning_draft.forward_objectives import DiffusionNFT, ForwardBatch, ForwardObjective
from lightning_draft.kl_gate import KLGate, MovingReference
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.checks import check_complete_groups, check_dtype, check_gradient
from lightning_draft.methods.kl_regularizer import KLRegularizer
from lightning_draft.methods.old_policy import OldParameters, OldPolicy
from lightning_draft.methods.rollout import Minibatch, Rollout, Trajectories, repeat_prompts, sample_noise, slices
from lightning_draft.methods.rollout_module import RolloutModule
from lightning_draft.models.base import Conditioning, DiffusionModel, x0_slope
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Grid, step_at
from lightning_draft.seeds import derive_seed
from lightning_draft.timesteps import TimeSpread, check_training_times, training_times


class ForwardProcessModule(RolloutModule):
    """Increase any reward, differentiable or not, by a denoising loss on the model's own samples.

    The old policy samples a rollout with any sampler, including deterministic ones; only the samples `x_0` and their
    advantages are stored. New noise is added, `x_t = alpha_t x_0 + sigma_t eps`, and with an objective `L` of the
    estimates `x0(x_t)` the loss is

        mean over times of L(x0_theta(x_t), x0_old(x_t), x_0, A) + kl_weight * mean |u_theta(x_t) - u_ref(x_t)|^2

    with `u` the network's prediction; the reference is the base model without `kl_reference`. A training step uses one
    minibatch of the rollout, as in `PolicyGradientModule`. Images are clamped to [0, 1] before their rewards are
    computed.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase.
        sampler: The sampler of rollouts and in validation; `DDIM(50)` by default.
        objective: The denoising loss; `DiffusionNFT()` by default.
        advantage_estimator: Map from rewards to advantages; `GroupRelative(divide_by_std=True)` by default.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, as in `RewardModule`.
        samples_per_prompt: Number of samples for each prompt of a batch.
        inner_epochs: Number of epochs on each rollout, each with new noise.
        old_policy: How the old policy, which samples rollouts, follows the trained parameters.
        kl_weight: Weight of the distance from the base model's predictions, at least 0; it costs one more network call
            per sample and time.
        kl_gate: If given, only suspicious samples have this term, as in `PolicyGradientModule`.
        kl_reference: If given, the reference of this term is replaced by the current model from time to time.
        times: `grid` chooses training times from the sampler's grid, `uniform` from the whole schedule, one in each of
            `num_times` equal parts.
        num_times: Number of training times of each sample; by default the sampler's number of steps. With `grid` they
            are chosen without replacement.
        micro_batch_size: Number of samples that are generated and trained on at a time; by default all. Objectives
            that compare the samples of a prompt need complete groups.
        timesteps_per_minibatch: Number of training times of a training step; by default all.
        checkpointing: What the backward pass recomputes, as in `PolicyGradientModule`.
        seed: Seed of all noise and of the training times, in `0..2^63 - 1`;
            by default 0, and on the command line that of `seed_everything`.

    Attributes:
        objective: The denoising loss.
        old: The old policy's parameters.

    Raises:
        ConfigurationError: An option is out of range.
    """

    objective: ForwardObjective

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        objective: ForwardObjective | None = None,
        advantage_estimator: AdvantageEstimator | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        samples_per_prompt: int = 8,
        inner_epochs: int = 1,
        old_policy: OldPolicy = OldPolicy(),  # noqa: B008 (frozen)
        kl_weight: float = 0.0,
        kl_gate: KLGate | None = None,
        kl_reference: MovingReference | None = None,
        times: TimeSpread = "grid",
        num_times: int | None = None,
        micro_batch_size: int | None = None,
        timesteps_per_minibatch: int | None = None,
        checkpointing: Checkpointing = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            model,
            reward,
            sampler,
            eval_rewards,
            optimizer,
            lr_scheduler,
            seed,
            DiffusionNFT() if objective is None else objective,
            GroupRelative(divide_by_std=True) if advantage_estimator is None else advantage_estimator,
            samples_per_prompt,
            inner_epochs,
            micro_batch_size,
            timesteps_per_minibatch,
            False,
            checkpointing,
            KLRegularizer(kl_weight, kl_gate, kl_reference),
        )
        self.old = OldParameters(old_policy)
        self.times: TimeSpread = times
        self.num_times = self.sampler.num_steps if num_times is None else num_times
        check_training_times(times, self.num_times, self.sampler.num_steps)

    def setup(self, stage: str) -> None:
        """Check the configuration before training; in a new run, the old policy is reset to the model."""
        super().setup(stage)
        if stage == "fit" and self.trainer.global_step == 0:
            self.old.values = {}

    def check_configuration(self) -> None:
        """Check that groups, minibatches and the strategy are valid for the objective.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        super().check_configuration()
        check_complete_groups(self.objective, self.micro_batch_size, self.samples_per_prompt)
        if self._keeps_old_policy:
            check_not_sharded(type(self.objective).__name__, self._trainer)

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check on one network call that the gradient of a prediction reaches the trainable parameters.

        The random state, the parameters and their gradients are not changed.

        Raises:
            ConfigurationError: The gradient is missing, zero or not finite.
        """
        check_dtype(self.trainable_parameters())
        with self.first_step_context():
            estimate = self._denoise(self.model.noise(len(prompts)), self._grid[-1][0], self.model.encode(prompts))
            if self.gradients_are_complete:
                value = (estimate * torch.randn_like(estimate)).sum()
                check_gradient(value, self.trainable_parameters().values(), "prediction")

    def rollout_timesteps(self) -> int:
        """Return the number of training times of a sample."""
        return self.num_times

    def training_times(self, number: int, epoch: int) -> list[float]:
        """Return the times of inner epoch `epoch` on rollout `number`, the same on every process."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, epoch))
        return training_times(self._grid, self.model.schedule, self.num_times, self.times, generator)

    @torch.no_grad()
    def collect_rollout(self, prompts: Sequence[str], number: int = 0, step: int = 0) -> Rollout:
        """Update the old policy, and collect a rollout with it."""
        if self._keeps_old_policy:
            self.old.update(self.trainable_parameters(), step)
        return super().collect_rollout(prompts, number, step)

    def sample_rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None, number: int
    ) -> Trajectories:
        """Return samples of the old policy, `(1, N, ...)`, and no log-probabilities."""
        with self.old.in_use(self.trainable_parameters()):
            parts = [self._sample(prompts[some], seeds[some]) for some in slices(len(prompts), self.micro_batch_size)]
        samples = torch.cat(parts)
        return Trajectories(samples[None], samples.new_empty(0, len(samples)))

    def minibatch_loss(
        self, prompts: Sequence[str], rollout: Rollout, minibatch: Minibatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch of the current rollout, and metrics."""
        epoch = self.buffer.index // len(self.minibatches(len(prompts)))
        return self.loss_and_logs(prompts, rollout, minibatch, epoch, moved=rollout.step != self.trainer.global_step)

    def loss_and_logs(
        self, prompts: Sequence[str], rollout: Rollout, minibatch: Minibatch, epoch: int = 0, moved: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss averaged over a minibatch of a rollout, a scalar with a graph, and detached metrics.

        Args:
            prompts: The batch for which the rollout was collected.
            rollout: From `collect_rollout`.
            minibatch: One of `minibatches`.
            epoch: Number of the inner epoch, on which the noise and the times depend.
            moved: Whether the model has changed since the rollout was collected. If not, and if the old policy was
                the model at that time, network calls of the old policy are not needed.
        """
        every = repeat_prompts(prompts, self.samples_per_prompt)
        rows, group = self.objective.rows(rollout.advantages, minibatch.samples, self.samples_per_prompt)
        samples, advantages = rollout.latents[-1, rows], rollout.advantages[rows]
        conditioning = self.model.encode([every[row] for row in rows])
        moved = moved or self.old.policy.decay(rollout.step) > 0
        times, outcomes = self.training_times(rollout.number, epoch), []
        for index in range(*minibatch.steps.indices(len(times))):
            alpha, sigma = self.model.schedule.coefficients(times[index])
            x = alpha * samples + sigma * self._noise(rollout.number, rows, epoch, index).to(samples)
            estimates = self._estimates(x, times[index], conditioning, moved)
            slope = x0_slope(alpha, sigma, self.model.prediction)
            reference = estimates.pop("kl_reference", estimates.get("ref"))
            batch = ForwardBatch(samples, estimates.pop("current"), advantages, group, sigma, slope, **estimates)
            outcomes.append(self._loss(batch, reference, None if rollout.kl_gate is None else rollout.kl_gate[rows]))
        losses, logs = zip(*outcomes, strict=True)
        return torch.stack(losses).mean(), {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}

    def extra_state(self) -> dict[str, Any]:
        """Return the training state besides parameters, including `old_policy`, the old parameters by name."""
        return {**super().extra_state(), "old_policy": self.old.values}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also save the old policy."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["old_policy"] = {name: value.cpu() for name, value in self.last_step_state()["old_policy"].items()}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the old policy, if this run has one; the checkpoint of another method has none."""
        super().on_load_checkpoint(checkpoint)
        self.old.values = dict(checkpoint.get("old_policy", {})) if self._keeps_old_policy else {}

    @property
    def _grid(self) -> Grid:
        return self.sampler.grid(self.model.schedule)

    @property
    def _keeps_old_policy(self) -> bool:
        return self.objective.needs_old or self.old.policy.max_decay > 0

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        chain = SamplingChain(self.model, self.sampler, self.model.encode(prompts))
        noise = sample_noise(self.model, chain.num_steps + 1, seeds)
        *_, (_, samples) = chain.sample_steps(noise[0], noise[1:])
        return samples

    def _noise(self, number: int, rows: Sequence[int], epoch: int, index: int) -> Tensor:
        """Return the noise of some samples of a rollout at one training time."""
        numbers = [row // self.samples_per_prompt if self.objective.shares_noise else row for row in rows]
        seeds = [derive_seed(self.seed, number, self.global_rank, row, epoch + 1, index) for row in numbers]
        return sample_noise(self.model, 1, seeds)[0]

    def _estimates(self, x: Tensor, t: float, conditioning: Conditioning, moved: bool) -> dict[str, Tensor]:
        """Return the estimates of `x_0` of the current model, and of the old policy and the base model if needed."""
        found: dict[str, Tensor] = {}
        with torch.no_grad(), self.model.at_step(step_at(self._grid, t), len(self._grid)):
            parameters, needs_base = self.trainable_parameters(), self.regularizer.needs_base
            reference = None if needs_base else self.regularizer.reference_model(self.model, parameters)
            if self.objective.needs_reference or needs_base:
                with self.model.base():
                    found["ref"] = self.model.denoise(x, t, conditioning)
            if reference is not None:
                with reference:
                    found["kl_reference"] = self.model.denoise(x, t, conditioning)
            if self.objective.needs_old and moved:
                with self.old.in_use(parameters):
                    found["old"] = self.model.denoise(x, t, conditioning)
        found["current"] = self._denoise(x, t, conditioning)
        if self.objective.needs_old and not moved:
            found["old"] = found["current"].detach()
        return found

    def _denoise(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        def denoise(x: Tensor) -> Tensor:
            with self.model.at_step(step_at(self._grid, t), len(self._grid)):
                return self.model.denoise(x, t, conditioning)

        return self.recompute.call(self.model, denoise, x)

    def _loss(
        self, batch: ForwardBatch, reference: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.objective(batch)
        logs = {"train/loss": loss, "train/denoising_error": batch.error(batch.estimate).mean()}
        if batch.old is not None:
            logs["train/old_distance"] = batch.distance(batch.estimate, batch.old).mean()
        clipped = self.objective.clipped(batch)
        if clipped is not None:
            logs["train/clip_fraction"] = clipped.float().mean()
        if self.regularizer.weight > 0 and reference is not None:
            kl = batch.distance(batch.estimate, reference)
            logs |= {"train/denoising_loss": loss, "train/kl": kl.mean()}
            loss = logs["train/loss"] = loss + self.regularizer.penalty(kl, gate)
        return loss, {name: value.detach() for name, value in logs.items()}
