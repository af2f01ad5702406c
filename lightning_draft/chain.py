"""The sampling chain: the only loop over denoising steps, and the only place that checkpoints activations."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.samplers import Sampler, Transition

Probe = Callable[[int, Tensor], None]
"""Called with (step, latent) for every latent that a step hands on and that carries a gradient."""


@dataclass(frozen=True)
class State:
    """A position in a chain.

    Attributes:
        x: The latent, `(B, ...)`.
        step: How many steps lie behind: 0 at the start, `num_steps` at the end.
        solver_state: What the sampler remembers of earlier steps.
    """

    x: Tensor
    step: int
    solver_state: Any = None


class SamplingChain:
    """Walks latents from noise to sample, with the gradient flow that a truncation asks for.

    Args:
        model: Predicts `x_0`; owns the schedule.
        sampler: Arithmetic of a step, and the grid.
        conditioning: What the model is conditioned on, for the whole batch.
        checkpoint_steps: Recompute each step's activations in the backward pass instead of keeping them.
        micro_batch_size: Run the steps that carry a gradient on slices of this many samples, each recomputed in the
            backward pass on its own, so that memory follows the slice and not the batch.
        generator: Source of the structural random choices (which step to stop at); every process must hold the same.
        measure_drift: Also evaluate the base model at the steps with gradient, for `drift`.
        probe: Observer of the latents that carry a gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sampler: Sampler,
        conditioning: Conditioning,
        *,
        checkpoint_steps: bool = False,
        micro_batch_size: int | None = None,
        generator: torch.Generator | None = None,
        measure_drift: bool = False,
        probe: Probe | None = None,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1; None takes the batch whole")
        self.model = model
        self.sampler = sampler
        self.conditioning = conditioning
        self.checkpoint_steps = checkpoint_steps
        self.micro_batch_size = micro_batch_size
        self.generator = generator
        self.measure_drift = measure_drift
        self.probe = probe
        self.grid = sampler.grid(model.schedule)
        self._drifts: list[Tensor] = []

    @property
    def num_steps(self) -> int:
        """Network evaluations from noise to sample."""
        return len(self.grid)

    @property
    def drift(self) -> Tensor | None:
        """Mean over the steps with gradient of `(eps_theta - eps_base)^2`, scalar; `None` unless it was measured."""
        return torch.stack(self._drifts).mean() if self._drifts else None

    def start(self, noise: Tensor) -> State:
        """Stand before the first step, with `noise` of shape `(B, ...)` as the latent."""
        return State(noise, 0)

    def advance(
        self, state: State, steps: int | None = None, *, detach_input: bool = False, freeze: bool = False
    ) -> State:
        """Walk `steps` steps, by default to the end.

        Args:
            state: Where to start.
            steps: How many.
            detach_input: Cut the gradient at the network's input; the latent's own path through the sampler stays.
            freeze: Give the network's output no gradient at all; the latent's own path stays.
        """
        remaining = self.num_steps - state.step
        steps = remaining if steps is None else steps
        if not 0 <= steps <= remaining:
            raise ValueError(f"cannot advance {steps} steps: {remaining} of {self.num_steps} are left")
        for _ in range(steps):
            state = self._advance_one(state, detach_input, freeze)
        return state

    def sample_steps(self, noise: Tensor, step_noise: Iterable[Tensor]) -> Iterator[tuple[Transition, Tensor]]:
        """Walk the whole chain with given noise; yield each step's distribution and the latent drawn from it.

        Args:
            noise: Where to start, `(B, ...)`.
            step_noise: `num_steps` times `(B, ...)`; what a deterministic step is given is not used.
        """
        state = self.start(noise)
        for _, fresh in zip(range(self.num_steps), step_noise, strict=True):
            transition, solver_state = self._step(state, False, False)
            state = State(transition.rsample(fresh), state.step + 1, solver_state)
            yield transition, state.x

    def transitions_at(self, latents: Tensor, steps: Iterable[int]) -> Iterator[Transition]:
        """The distributions of the next latents at some steps of a walk, `latents` being `(num_steps + 1, B, ...)`."""
        for step in steps:
            yield self.transition(State(latents[step], step))

    def transition(self, state: State, *, detach_input: bool = False, freeze: bool = False) -> Transition:
        """The distribution of the next latent."""
        return self._step(state, detach_input, freeze)[0]

    def predict(self, state: State, *, detach_input: bool = False, freeze: bool = False) -> Tensor:
        """The network's estimate of the clean latent, `(B, ...)`."""
        return self._observed(state.step, self._denoise(state, detach_input, freeze))

    def renoise(self, x0: Tensor, steps_left: int, noise: Tensor | None = None) -> State:
        """Diffuse `x0` to where `steps_left` steps remain; `noise` is drawn here unless it is given."""
        if not 1 <= steps_left <= self.num_steps:
            raise ValueError(f"steps_left={steps_left} must lie in 1..{self.num_steps}")
        step = self.num_steps - steps_left
        alpha, sigma = self.model.schedule.coefficients(self.grid[step][0])
        return State(alpha * x0 + sigma * (torch.randn_like(x0) if noise is None else noise), step)

    def repeat(self, copies: int) -> "SamplingChain":
        """The same chain for `copies` copies of the batch, one after the other: row `c * B + b` is copy `c` of `b`."""
        other = SamplingChain.__new__(SamplingChain)
        other.__dict__ = {**self.__dict__, "conditioning": self.conditioning.repeat(copies)}
        return other

    def randint(self, low: int, high: int) -> int:
        """A whole number in `low..high`, both included, the same on every process."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def rand(self) -> float:
        """A number in [0, 1), the same on every process."""
        return float(torch.rand((), generator=self.generator))

    def _advance_one(self, state: State, detach_input: bool, freeze: bool) -> State:
        transition, solver_state = self._step(state, detach_input, freeze)
        return State(self._observed(state.step, transition.rsample()), state.step + 1, solver_state)

    def _step(self, state: State, detach_input: bool, freeze: bool) -> tuple[Transition, Any]:
        x0 = self._denoise(state, detach_input, freeze)
        t, s = self.grid[state.step]
        return self.sampler.step(self.model.schedule, state.x, x0, t, s, state.solver_state)

    def _denoise(self, state: State, detach_input: bool, freeze: bool) -> Tensor:
        t, _ = self.grid[state.step]

        def denoise(x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
            x0 = self.model.denoise(x, t, conditioning, detach_input=detach_input, freeze=freeze)
            return x0, self._drift(x, x0, t, conditioning)

        if freeze or not torch.is_grad_enabled():
            return self.model.denoise(state.x, t, self.conditioning, detach_input=detach_input, freeze=freeze)
        slices = _slices(len(state.x), self.micro_batch_size)
        if self.checkpoint_steps or len(slices) > 1:
            parts = [checkpoint(denoise, state.x[p], self.conditioning[p], use_reentrant=False) for p in slices]
        else:
            parts = [denoise(state.x, self.conditioning)]
        if self.measure_drift:
            self._drifts.append(torch.cat([drift for _, drift in parts]).mean())
        return parts[0][0] if len(parts) == 1 else torch.cat([x0 for x0, _ in parts])

    def _observed(self, step: int, latent: Tensor) -> Tensor:
        if self.probe is not None and latent.requires_grad:
            self.probe(step, latent)
        return latent

    def _drift(self, x: Tensor, x0: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """`(eps_theta - eps_base)^2` averaged over each latent, `(B,)`; empty unless it is measured.

        `eps_base` is a constant, as in NeMo-Aligner's code: freezing the base network's output but not the conversion
        to `x_0` lets the latent cancel out of the difference, value and gradient.
        """
        if not self.measure_drift:
            return x.new_empty(0)
        alpha, sigma = self.model.schedule.coefficients(t)
        with self.model.base():
            base = self.model.denoise(x, t, conditioning, freeze=True)
        return (alpha / sigma * (x0 - base)).square().flatten(1).mean(1)


def _slices(batch: int, size: int | None) -> list[slice]:
    size = batch if size is None else size
    return [slice(start, start + size) for start in range(0, batch, size)]
