"""Rollouts: trajectories that a stochastic sampler drew, and the parts in which they are trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_draft.chain import Recompute, SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import DiffusionModel
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Schedule


@dataclass(frozen=True)
class Rollout:
    """Trajectories and what they were worth; `T` steps, `S` of them stochastic, `N` samples.

    Args:
        number: Which rollout of the run it is.
        step: How many optimiser steps were behind the model that drew it.
        prompts: One a sample; samples of a prompt lie side by side.
        latents: `(T + 1, N, ...)`, from noise to sample.
        log_probs: Of the stochastic steps, under the model that took them, `(S, N)`.
        rewards: `(N,)`.
        advantages: `(N,)`.
        summary: What to log of it.
        ref_log_probs: As `log_probs` under the base model, where it was asked for.
    """

    number: int
    step: int
    prompts: list[str]
    latents: Tensor
    log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    summary: dict[str, float]
    ref_log_probs: Tensor | None = None

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on another device."""
        state: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.state_dict().items()
        }
        return Rollout(**state)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in types that any checkpoint holds."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class LogProbGradients:
    """An objective at a point: its value, and its derivatives by the log-probabilities.

    Args:
        weights: `(S, N)`.
        loss: Scalar.
    """

    weights: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Minibatch:
    """Some steps of some samples.

    Args:
        samples: Which samples.
        steps: Which of the stochastic steps.
        fraction: Share of the whole rollout's steps and samples, in (0, 1].
    """

    samples: slice
    steps: slice
    fraction: float


def minibatches(
    samples: int, steps: int, micro_batch_size: int | None, timesteps_per_minibatch: int | None
) -> list[Minibatch]:
    """Split a rollout of `samples` by `steps` into minibatches, all steps of some samples before the next samples."""
    return [
        Minibatch(some, few, (some.stop - some.start) * (few.stop - few.start) / (samples * steps))
        for some in slices(samples, micro_batch_size)
        for few in slices(steps, timesteps_per_minibatch)
    ]


def slices(length: int, size: int | None) -> list[slice]:
    """`0..length` in slices of `size`, the last one possibly shorter."""
    size = length if size is None else size
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class Policy:
    """A model and a stochastic sampler, as what draws trajectories and knows how likely their steps are.

    Args:
        model: The diffusion model.
        sampler: The sampler.
        reduce: Turns a sum over a given number of latent dimensions into the unit of log-probabilities.
        micro_batch_size: Handle this many samples at a time; by default all.
        recompute: What the backward pass computes again.

    Attributes:
        steps: The stochastic steps.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sampler: Sampler,
        reduce: Callable[[Tensor, int], Tensor],
        micro_batch_size: int | None,
        recompute: Recompute,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.reduce = reduce
        self.micro_batch_size = micro_batch_size
        self.recompute = recompute
        self.steps = stochastic_steps(sampler, model.schedule)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents `(T + 1, N, ...)` and log-probabilities `(S, N)`, each sample from a seed of its own."""
        pieces = [self._walk(prompts[some], seeds[some]) for some in slices(len(prompts), self.micro_batch_size)]
        latents, log_probs = zip(*pieces, strict=True)
        return torch.cat(latents, 1), torch.cat(log_probs, 1)

    def evaluate(
        self, prompts: Sequence[str], latents: Tensor, steps: Sequence[int], diverge: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `(S, B)` of some steps, and if asked for their mean KL divergence from the base model."""
        chain = self._chain(prompts)
        ours = list(chain.transitions_at(latents, steps))
        taken = [transition.log_prob(latents[step + 1]) for step, transition in zip(steps, ours, strict=True)]
        elements = latents[0, 0].numel()
        log_probs = self.reduce(torch.stack(taken), elements)
        if not diverge:
            return log_probs, None
        with torch.no_grad(), self.model.base():
            base = list(chain.transitions_at(latents, steps))
        divergence = torch.stack([one.kl(other) for one, other in zip(ours, base, strict=True)])
        return log_probs, self.reduce(divergence, elements).mean()

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[str], latents: Tensor) -> Tensor:
        """Of all stochastic steps, `(S, N)`, without a graph."""
        pieces = slices(len(prompts), self.micro_batch_size)
        return torch.cat([self.evaluate(prompts[some], latents[:, some], self.steps)[0] for some in pieces], 1)

    def _walk(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        chain = self._chain(prompts)
        # A generator a sample: its noise does not depend on what it is drawn with.
        each = [self.model.noise(chain.num_steps + 1, torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(each, 1)
        latents, log_probs = [noise[0]], []
        for transition, x in chain.sample_steps(noise[0], noise[1:]):
            latents.append(x)
            if transition.std > 0:
                log_probs.append(self.reduce(transition.log_prob(x), x[0].numel()))
        return torch.stack(latents), torch.stack(log_probs)

    def _chain(self, prompts: Sequence[str]) -> SamplingChain:
        return SamplingChain(self.model, self.sampler, self.model.encode(prompts), recompute=self.recompute)


def stochastic_steps(sampler: Sampler, schedule: Schedule) -> list[int]:
    """The steps that add noise, and thus have a log-probability.

    Raises:
        ConfigurationError: A stochastic step depends on earlier ones, which a rollout does not hold.
    """
    probe = torch.zeros(1, 1, dtype=torch.float64)
    found = []
    for step, (t, s) in enumerate(sampler.grid(schedule)):
        transition, solver_state = sampler.step(schedule, probe, probe, t, s)
        if transition.std > 0 and solver_state is not None:
            raise ConfigurationError(
                f"{type(sampler).__name__} is a multistep solver, which policy gradients do not support; use "
                "DDIM(eta=1) or FlowSDE"
            )
        if transition.std > 0:
            found.append(step)
    return found


def summarise(rewards: Tensor, advantages: Tensor, group: int) -> dict[str, float]:
    """What to log of a rollout: its reward overall and by prompt, and what there is to learn from it."""
    groups, spread = rewards.view(-1, group), advantages.view(-1, group)
    return {
        "train/reward": float(rewards.mean()),
        "train/reward_within_prompts": float(groups.std(1, correction=0).mean()),
        "train/reward_worst_prompt": float(groups.mean(1).amin()),
        "train/reward_best_prompt": float(groups.mean(1).amax()),
        "train/advantage_std": float(advantages.std(correction=0)),
        "train/zero_advantage_groups": float((spread == 0).all(1).float().mean()),
    }
