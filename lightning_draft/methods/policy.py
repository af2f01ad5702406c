"""A diffusion model with a stochastic sampler as a policy, whose actions are the sampling steps.

Shapes: `T` sampling steps, `S` of them stochastic, `N` samples.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.rollout import Trajectories, sample_noise, slices
from lightning_draft.models.base import DiffusionModel
from lightning_draft.objectives import MeanChange
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Schedule
from lightning_draft.transition import Transition
from lightning_draft.windows import noise_at_steps


class Evaluation(NamedTuple):
    """Some steps of trajectories under the current model.

    Args:
        log_probs: `(S, B)`.
        kl: KL divergences from the reference, `(S, B)`, if they were computed.
        change: The change of the steps' means since the rollout, if the old means were given.
    """

    log_probs: Tensor
    kl: Tensor | None = None
    change: MeanChange | None = None


class Policy:
    """Sample trajectories, and evaluate the log-probabilities of their steps.

    Args:
        model: The diffusion model.
        sampler: The sampler.
        reduce: Called with a log-probability summed over latent dimensions, and the number of these dimensions.
        micro_batch_size: Number of samples per network call; by default all.
        kl_per_time: Whether the divergence of a step is multiplied by its length in time.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sampler: Sampler,
        reduce: Callable[[Tensor, int], Tensor],
        micro_batch_size: int | None,
        kl_per_time: bool = False,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.reduce = reduce
        self.micro_batch_size = micro_batch_size
        self.kl_per_time = kl_per_time

    @cached_property
    def steps(self) -> list[int]:
        """The stochastic steps."""
        return stochastic_steps(self.sampler, self.model.schedule)

    def within(self, steps: Sequence[int]) -> "Policy":
        """Return the policy that adds noise only at the given steps."""
        sampler = noise_at_steps(self.sampler, steps)
        return Policy(self.model, sampler, self.reduce, self.micro_batch_size, self.kl_per_time)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        start_seeds: Sequence[int] | None = None,
        with_means: bool = False,
    ) -> Trajectories:
        """Return trajectories with `T + 1` latents, and optionally the means; each sample has its own seed."""
        parts = slices(len(prompts), self.micro_batch_size)
        results = [
            self._sample(prompts[some], seeds[some], start_seeds and start_seeds[some], with_means) for some in parts
        ]
        means = torch.cat([each.means for each in results if each.means is not None], 1) if with_means else None
        latents = torch.cat([each.latents for each in results], 1)
        return Trajectories(latents, torch.cat([each.log_probs for each in results], 1), means)

    def evaluate(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        steps: Sequence[int],
        reference: AbstractContextManager[Any] | None = None,
        old_means: Tensor | None = None,
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
    ) -> Evaluation:
        """Return the log-probabilities of some steps, and optionally divergences.

        Args:
            prompts: `B` prompts.
            latents: `(T + 1, B, ...)`.
            steps: `S` stochastic steps.
            reference: A context in which the model is the reference, to compute the divergence from it.
            old_means: Means of the steps at the rollout, `(S, B, ...)`, to compute how far they have moved.
            recompute: Activations that the backward pass recomputes.
        """
        chain = self._chain(prompts, recompute)
        transitions = list(chain.transitions_at(latents, steps))
        log_probs = [
            transition.log_prob(latents[step + 1]) for step, transition in zip(steps, transitions, strict=True)
        ]
        elements = latents[0, 0].numel()
        reduced = self.reduce(torch.stack(log_probs), elements)
        change = None if old_means is None else self._change(transitions, old_means, steps)
        if reference is None:
            return Evaluation(reduced, change=change)
        with torch.no_grad(), reference:
            others = list(chain.transitions_at(latents, steps))
        kl = torch.stack([ours.kl(theirs) for ours, theirs in zip(transitions, others, strict=True)])
        if self.kl_per_time:
            kl = kl * self._lengths(steps).to(kl)
        return Evaluation(reduced, self.reduce(kl, elements), change)

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[str], latents: Tensor) -> Tensor:
        """Return the log-probabilities of all stochastic steps, `(S, N)`, without a graph."""
        some = slices(len(prompts), self.micro_batch_size)
        return torch.cat([self.evaluate(prompts[part], latents[:, part], self.steps).log_probs for part in some], 1)

    def _sample(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None, with_means: bool
    ) -> Trajectories:
        chain = self._chain(prompts)
        noise = sample_noise(self.model, chain.num_steps + 1, seeds, start_seeds)
        latents, log_probs, means = [noise[0]], [], []
        for transition, x in chain.sample_steps(noise[0], noise[1:]):
            latents.append(x)
            if transition.std > 0:
                log_probs.append(self.reduce(transition.log_prob(x), x[0].numel()))
                means += [transition.mean] * with_means
        return Trajectories(torch.stack(latents), torch.stack(log_probs), torch.stack(means) if with_means else None)

    def _change(self, transitions: Sequence[Transition], old_means: Tensor, steps: Sequence[int]) -> MeanChange:
        pairs = zip(old_means, transitions, strict=True)
        kl = torch.stack([Transition(old, now.std).kl(now) for old, now in pairs])
        stds = torch.tensor([[now.std] for now in transitions]).to(kl)
        return MeanChange(self.reduce(kl, old_means[0, 0].numel()), stds, self._lengths(steps).to(kl))

    def _lengths(self, steps: Sequence[int]) -> Tensor:
        """Return the lengths of steps, as fractions of the schedule, `(S, 1)`."""
        schedule = self.model.schedule
        grid, time = self.sampler.grid(schedule), schedule.network_time
        return torch.tensor([[time(grid[i][0]) - time(grid[i][1])] for i in steps]) / schedule.num_train_timesteps

    def _chain(self, prompts: Sequence[str], recompute: Recompute = Recompute()) -> SamplingChain:  # noqa: B008 (frozen)
        return SamplingChain(self.model, self.sampler, self.model.encode(prompts), recompute=recompute)


def stochastic_steps(sampler: Sampler, schedule: Schedule) -> list[int]:
    """Return the steps that add noise and therefore have a log-probability.

    Raises:
        ConfigurationError: A stochastic step depends on earlier steps, which a rollout does not store.
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
