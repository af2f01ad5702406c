"""Direct gradients: back-propagate a differentiable reward through the sampler.

References:
    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400 (DRaFT).
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_draft.arguments import at_least
from lightning_draft.chain import PredictionDrift
from lightning_draft.distributed import uses_deepspeed, uses_fsdp
from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Maximize, RewardLoss
from lightning_draft.methods.anchor import Anchor, BaseSamples, denoising_error
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.checks import (
    check_dtype,
    check_final_step,
    check_gradient,
    check_latents,
    check_loss,
    check_reward,
)
from lightning_draft.methods.direct import DirectModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import Sampler
from lightning_draft.truncation import LastK, Truncation


class DraftModule(DirectModule):
    """Back-propagate a differentiable reward through the sampler; the truncation decides where the gradient flows.

    For `B` prompts, the truncation returns latents `x_0 = truncation(noise)`: several for each prompt with DRaFT-LV,
    numbered by `c`, and one otherwise. The loss is

        L = 1/B sum_b sum_c loss(r(decode(x_0[c, b]), prompt_b)) + kl_weight * mean (eps_theta - eps_base)^2

    and the penalty of the anchor, if there is one.

    Args:
        model: The diffusion model, with its trainable parameters.
        reward: The reward to increase; it must be differentiable.
        sampler: The sampler in training and in validation; `DDIM(50)` by default.
        truncation: Which steps have a gradient; by default `LastK(1)`, which is DRaFT-1.
        loss: Map from reward to loss; `Maximize()` by default.
        eval_rewards: Rewards by name that are computed on validation images and not trained on.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer; it steps once per optimizer step, `ReduceLROnPlateau` once per
            validation.
        kl_weight: Weight of `mean (eps_theta - eps_base)^2` over the steps with gradient (DRaFT+), at least 0; each of
            those steps then costs one more network call.
        anchor: If given, add a denoising loss on the base model's own samples; it costs a network call with gradient
            per sample, and a sampling chain for each prompt, once. The samples are kept in memory.
        checkpointing: What the backward pass recomputes: the network call of each `step`, each `block` inside the
            network, `both` or `none`; `auto` is `step` if this lowers the peak: if several steps have a gradient, or a
            decoder or the reward's network follows. With one such step it costs one more network call.
        micro_batch_size: Number of samples for which a graph is built at a time; by default the whole batch. Memory is
            proportional to it, and activations are recomputed.
        seed: Seed of the starting noise and of the truncation's random choices, in `0..2^63 - 1`;
            by default 0, and on the command line that of `seed_everything`.

    Raises:
        ConfigurationError: An option is out of range.
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
        anchor: Anchor | None = None,
        checkpointing: Checkpointing = "auto",
        micro_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            model, reward, sampler, eval_rewards, optimizer, lr_scheduler, seed, checkpointing, micro_batch_size
        )
        self.truncation = LastK(1) if truncation is None else truncation
        self.loss = Maximize() if loss is None else loss
        self.kl_weight = at_least("kl_weight", kl_weight, 0)
        self.anchor = anchor
        self.base_samples = BaseSamples(model, self.sampler, self.seed)

    def setup(self, stage: str) -> None:
        """Check the configuration, and drop samples of the base model: sampler and guidance may have changed."""
        super().setup(stage)
        self.base_samples = BaseSamples(self.model, self.sampler, self.seed)

    def gradient_steps(self) -> int:
        """Return the largest number of steps of a chain with gradient."""
        return self.truncation.gradient_steps(self.sampler.num_steps)

    def recomputing_steps_lowers_the_peak(self) -> bool:
        """Return whether another step with gradient, a decoder or the reward's network follows a step."""
        decoder = self.model.decoder if self.reward.uses_images else None
        networks = (decoder, next(self.reward.parameters(), None))
        return super().recomputing_steps_lowers_the_peak() or any(each is not None for each in networks)

    @property
    def method(self) -> Truncation:
        """The truncation."""
        return self.truncation

    def strategies(self) -> dict[str, object]:
        """Return the strategies of the run, including the loss and the anchor."""
        anchor = {} if self.anchor is None else {"anchor": self.anchor}
        return {**super().strategies(), "loss": self.loss, **anchor}

    def check_configuration(self) -> None:
        """Check that the reward is differentiable, something is trained, and sampler and truncation fit the model.

        Raises:
            ConfigurationError: One of these checks fails.
        """
        super().check_configuration()
        if self.anchor is not None and (uses_fsdp(self._trainer) or uses_deepspeed(self._trainer)):
            raise ConfigurationError(
                "anchor generates samples on each process by itself, which is not supported with sharding; set the "
                "Trainer's strategy to ddp, or use kl_weight"
            )
        check_final_step(self.truncation, self.sampler, self.model.schedule)

    def check_first_step(self, prompts: Sequence[str]) -> None:
        """Run the method on some prompts and check the gradient from the reward to the trainable parameters.

        The random state, the parameters and their gradients are not changed.

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
                    samples = self.decoded(latents)
                prompts = list(prompts) * (len(latents) // len(prompts))
                check_reward(self.reward, samples, prompts)
                if self.gradients_are_complete:
                    rewards = self.rewards(latents, prompts).scores
                    check_gradient(rewards.sum(), self.trainable_parameters().values(), "reward")
                    check_loss(self.loss, rewards)
        finally:
            self.probes = probes

    def loss_and_logs(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, a scalar with a graph, and detached metrics.

        Args:
            prompts: The batch.
            generator: Generator of the truncation's random choices, the same on every process.
        """
        drift = PredictionDrift() if self.kl_weight > 0 else None
        chain = self.chain(prompts, generator, drift)
        latents = self.truncation(chain, self.model.noise(len(prompts)))
        copies = len(latents) // len(prompts)
        rewards, components, pixels = self.rewards(latents, list(prompts) * copies)
        self.update_statistics(components)
        # The losses of DRaFT-LV's copies are added; those of the batch are averaged.
        loss = self.loss(rewards).view(copies, -1).sum(0).mean() * _nan_unless_finite(rewards)
        logs = {
            "train/reward": rewards[: len(prompts)].mean(),
            **{f"train/reward/{name}": scores[: len(prompts)].mean() for name, scores in components.items()},
            **{name: values.mean() for name, values in pixels.items()},
        }
        total = loss
        if drift is not None and drift.mean is not None:
            logs["train/prediction_drift"] = drift.mean
            total = total + self.kl_weight * drift.mean
        if self.anchor is not None:
            logs["train/anchor_error"] = denoising_error(chain, self.base_samples(prompts).to(latents.device))
            total = total + self.anchor.weight * logs["train/anchor_error"]
        if total is not loss:
            logs["train/reward_loss"] = loss
        return total, {name: value.detach() for name, value in {**logs, "train/loss": total}.items()}


def _nan_unless_finite(values: Tensor) -> Tensor:
    """Return 1, or NaN if a value is not finite, because an infinite reward may have a finite gradient."""
    return torch.where(values.detach().isfinite().all(), 1.0, float("nan"))
