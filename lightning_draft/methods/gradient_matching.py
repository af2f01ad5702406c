"""Gradient matching: regress the difference from the base model on gradients of the reward.

References:
    Domingo-Enrich et al., "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless
        Stochastic Optimal Control", arXiv:2409.08861.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.arguments import integer_at_least
from lightning_draft.chain import State
from lightning_draft.errors import ConfigurationError
from lightning_draft.gradient_matching import AdjointMatching, GradientMatching, Residual, Trajectory
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.checks import check_dtype, check_gradient, check_reward, check_sampler
from lightning_draft.methods.direct import DirectModule
from lightning_draft.methods.policy import stochastic_steps
from lightning_draft.models.base import DiffusionModel, x0_slope
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.inputs import check_finite
from lightning_draft.samplers import DDIM, Sampler


class GradientMatchingModule(DirectModule):
    """Increase a differentiable reward by matching the change of the predictions to the gradient of the reward.

    Each training step samples trajectories without a graph, computes a target from the gradient of the reward for each
    trained step `k`, and minimizes

        L = mean_k matching.loss(residual_k, target_k),

    where the residual is the difference of the model's prediction and step from those of the base model. The loss also
    regularizes towards the base model: at its optimum the difference is finite.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase; it must be differentiable.
        sampler: The sampler in training and in validation; `DDIM(50, eta=1)` by default.
        matching: The targets and the loss; `AdjointMatching()` by default.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, as in `RewardModule`.
        trained_steps: Number of sampling steps of each trajectory that are trained, chosen at random; by default all.
            Steps without noise are excluded if the matching needs noise.
        checkpointing: What the backward pass recomputes: the network call of each `step`, each `block` inside the
            network, `both` or `none`; `auto` is `step` if more than one step is trained, else `none`.
        micro_batch_size: Number of samples for which a graph is built at a time; by default the whole batch.
        seed: Seed of all noise and of the choice of steps, in `0..2^63 - 1`;
            by default 0, and on the command line that of `seed_everything`.

    Raises:
        ConfigurationError: An option is out of range.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None = None,
        matching: GradientMatching | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        trained_steps: int | None = None,
        checkpointing: Checkpointing = "auto",
        micro_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        sampler = DDIM(50, eta=1.0) if sampler is None else sampler
        super().__init__(
            model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed, checkpointing, micro_batch_size
        )
        self.matching = AdjointMatching() if matching is None else matching
        self.trained_steps = None if trained_steps is None else integer_at_least("trained_steps", trained_steps, 1)

    @property
    def method(self) -> GradientMatching:
        """The matching."""
        return self.matching

    def gradient_steps(self) -> int:
        """Return the number of trained steps of a trajectory."""
        return self.trained_steps or self.sampler.num_steps

    def check_configuration(self) -> None:
        """Check that the reward is differentiable, and that the sampler has as many steps as are trained.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        super().check_configuration()
        self._trainable_steps()
        if self.matching.assumes_memoryless and not self.sampler.is_memoryless:
            rank_zero_warn(
                f"{type(self.sampler).__name__} with these options is not memoryless, so the optimum of "
                f"{type(self.matching).__name__} depends on the starting noise and is not p_base exp(scale r) / Z; use "
                "DDIM(eta=1), or FlowSDE(noise_level=1.4142) for a rectified flow"
            )

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Check the reward's gradient, and that of a prediction with respect to the trainable parameters.

        The random state, the parameters and their gradients are not changed.

        Raises:
            ConfigurationError: A gradient is missing, zero or not finite.
        """
        check_dtype(self.trainable_parameters())
        with self.first_step_context():
            chain = self.chain(prompts)
            noise = self.model.noise(len(prompts))
            with torch.no_grad():
                samples = self.decoded(chain.advance(chain.start(noise)).x)
            check_reward(self.reward, samples, list(prompts))
            estimate = chain.predict(State(noise, chain.num_steps - 1))
            if self.gradients_are_complete:
                value = (estimate * torch.randn_like(estimate)).sum()
                check_gradient(value, self.trainable_parameters().values(), "prediction")

    def loss_and_logs(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, a scalar with a graph, and detached metrics.

        Args:
            prompts: The batch.
            generator: Generator of the choice of steps, the same on every process.
        """
        trajectory, logs = self.sample_trajectory(prompts, generator)
        steps = self._trainable_steps()
        if self.trained_steps is not None:
            steps = [steps[i] for i in trajectory.chain.choose([1.0] * len(steps), self.trained_steps)]
        targets = self.matching.targets(trajectory, steps)
        residuals = [self.residual(trajectory, step) for step in steps]
        losses = [self.matching.loss(each, target) for each, target in zip(residuals, targets, strict=True)]
        loss = torch.stack(losses).mean()
        logs |= {
            "train/loss": loss,
            "train/prediction_change": torch.stack([each.prediction.square().mean() for each in residuals]).mean(),
            "train/target_norm": torch.stack([target.flatten(1).norm(dim=1).mean() for target in targets]).mean(),
        }
        return loss, {name: value.detach() for name, value in logs.items()}

    def sample_trajectory(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Trajectory, dict[str, Tensor]]:
        """Sample trajectories without a graph, and return them with the reward's metrics.

        Args:
            prompts: The batch.
            generator: Generator of the choice of steps.
        """
        chain, names = self.chain(prompts, generator), list(prompts)
        noise = [self.model.noise(len(names)) for _ in range(chain.num_steps + 1)]
        with torch.no_grad():
            latents = torch.stack([noise[0], *(x for _, x in chain.sample_steps(noise[0], noise[1:]))])
            scores, components, pixels = self.rewards(latents[-1], names)
        check_finite(scores, latents[-1], names, self.reward)
        self.update_statistics(components)
        logs = {
            "train/reward": scores.mean(),
            **{f"train/reward/{name}": values.mean() for name, values in components.items()},
            **{name: values.mean() for name, values in pixels.items()},
        }
        return Trajectory(chain, latents, lambda x: self.reward_gradient(x, names)), logs

    def reward_gradient(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Return the gradient of each sample's reward with respect to its clean latent, `(B, ...)`."""
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            return torch.autograd.grad(self.rewards(latents, prompts).scores.sum(), latents)[0]

    def residual(self, trajectory: Trajectory, step: int) -> Residual:
        """Return the difference from the base model at a step of a trajectory, with a graph."""
        chain, x = trajectory.chain, trajectory.latents[step]
        t, s = chain.grid[step]
        x0 = chain.predict(State(x, step))
        with torch.no_grad(), self.model.base():
            base = chain.predict(State(x, step))
        schedule = self.model.schedule
        ours, theirs = (self.sampler.step(schedule, x, estimate, t, s)[0] for estimate in (x0, base))
        slope = x0_slope(*schedule.coefficients(t), self.model.prediction)
        return Residual((x0 - base) / slope, ours.mean - theirs.mean, ours.std)

    def _trainable_steps(self) -> list[int]:
        """Return the steps that can be trained.

        Raises:
            ConfigurationError: There are no such steps, or fewer than `trained_steps`.
        """
        check_sampler(self.sampler, self.model.schedule)
        noisy = stochastic_steps(self.sampler, self.model.schedule)
        steps = noisy if self.matching.needs_noise else list(range(self.sampler.num_steps))
        name = type(self.matching).__name__
        if not steps:
            raise ConfigurationError(
                f"{name} trains only steps that add noise, and {type(self.sampler).__name__} adds no noise; use "
                "DDIM(eta=1), or FlowSDE for a rectified flow"
            )
        if len(steps) < self.gradient_steps() and self.trained_steps is not None:
            raise ConfigurationError(
                f"trained_steps={self.trained_steps} exceeds the {len(steps)} steps that {name} can train; write "
                f"{len(steps)} or less"
            )
        return steps
