"""A diffusion model with a stochastic sampler as a policy, whose actions are the sampling steps.

Shapes: `T` sampling steps, `S` of them stochastic, `N` samples.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_draft.chain import Recompute, SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.rollout import sample_noise, slices
from lightning_draft.models.base import DiffusionModel
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Schedule
from lightning_draft.windows import noise_at_steps


class Policy:
    """Sample trajectories, and evaluate the log-probabilities of their steps.

    Args:
        model: The diffusion model.
        sampler: The sampler.
        reduce: Called with a log-probability summed over latent dimensions, and the number of these dimensions.
        micro_batch_size: Number of samples per network call; by default all.
        recompute: Activations that the backward pass recomputes.
        kl_per_time: Whether the divergence of a step is multiplied by its length in time.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sampler: Sampler,
        reduce: Callable[[Tensor, int], Tensor],
        micro_batch_size: int | None,
        recompute: Recompute,
        kl_per_time: bool = False,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.reduce = reduce
        self.micro_batch_size = micro_batch_size
        self.recompute = recompute
        self.kl_per_time = kl_per_time

    @cached_property
    def steps(self) -> list[int]:
        """The stochastic steps."""
        return stochastic_steps(self.sampler, self.model.schedule)

    def within(self, steps: Sequence[int]) -> "Policy":
        """Return the policy that adds noise only at the given steps."""
        sampler = noise_at_steps(self.sampler, steps)
        return Policy(self.model, sampler, self.reduce, self.micro_batch_size, self.recompute, self.kl_per_time)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return latents `(T + 1, N, ...)` and log-probabilities `(S, N)`; each sample has its own seed."""
        parts = slices(len(prompts), self.micro_batch_size)
        results = [self._sample(prompts[some], seeds[some], start_seeds and start_seeds[some]) for some in parts]
        latents, log_probs = zip(*results, strict=True)
        return torch.cat(latents, 1), torch.cat(log_probs, 1)

    def evaluate(
        self, prompts: Sequence[str], latents: Tensor, steps: Sequence[int], with_kl: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-probabilities of some steps, and optionally their mean KL divergence from the base model.

        Args:
            prompts: `B` prompts.
            latents: `(T + 1, B, ...)`.
            steps: `S` stochastic steps.
            with_kl: Whether to compute the divergence.

        Returns:
            Log-probabilities `(S, B)`, and a scalar or `None`.
        """
        chain = self._chain(prompts)
        transitions = list(chain.transitions_at(latents, steps))
        log_probs = [
            transition.log_prob(latents[step + 1]) for step, transition in zip(steps, transitions, strict=True)
        ]
        elements = latents[0, 0].numel()
        reduced = self.reduce(torch.stack(log_probs), elements)
        if not with_kl:
            return reduced, None
        with torch.no_grad(), self.model.base():
            base = list(chain.transitions_at(latents, steps))
        kl = torch.stack([ours.kl(theirs) for ours, theirs in zip(transitions, base, strict=True)])
        if self.kl_per_time:
            kl = kl * torch.tensor([self._length(step) for step in steps]).to(kl)[:, None]
        return reduced, self.reduce(kl, elements).mean()

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[str], latents: Tensor) -> Tensor:
        """Return the log-probabilities of all stochastic steps, `(S, N)`, without a graph."""
        some = slices(len(prompts), self.micro_batch_size)
        return torch.cat([self.evaluate(prompts[part], latents[:, part], self.steps)[0] for part in some], 1)

    def _sample(
        self, prompts: Sequence[str], seeds: Sequence[int], start_seeds: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        chain = self._chain(prompts)
        noise = sample_noise(self.model, chain.num_steps + 1, seeds, start_seeds)
        latents, log_probs = [noise[0]], []
        for transition, x in chain.sample_steps(noise[0], noise[1:]):
            latents.append(x)
            if transition.std > 0:
                log_probs.append(self.reduce(transition.log_prob(x), x[0].numel()))
        return torch.stack(latents), torch.stack(log_probs)

    def _length(self, step: int) -> float:
        """Return the length of a step, as a fraction of the schedule."""
        schedule = self.model.schedule
        t, s = self.sampler.grid(schedule)[step]
        return (schedule.network_time(t) - schedule.network_time(s)) / schedule.num_train_timesteps

    def _chain(self, prompts: Sequence[str]) -> SamplingChain:
        return SamplingChain(self.model, self.sampler, self.model.encode(prompts), recompute=self.recompute)


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
