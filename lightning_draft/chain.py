"""The sampling chain: the only loop over sampling steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Grid
from lightning_draft.transition import Transition

Probe = Callable[[int, Tensor], None]
"""Called with (step, latent) for every latent that a step returns with a graph."""


@dataclass(frozen=True)
class State:
    """A position in a chain.

    Attributes:
        x: The latent, `(B, ...)`.
        step: Number of steps taken: 0 at the start, `num_steps` at the end.
        solver_state: Solver state that the sampler returned at the previous step; `None` for single-step samplers.
    """

    x: Tensor
    step: int
    solver_state: Any = None


class PredictionDrift:
    """Accumulate the distance of the noise prediction from the base model's over the steps with gradient.

        drift = mean over steps of mean (eps_theta - eps_base)^2

    `eps_base` is a constant, as in NeMo-Aligner's code: the gradient flows only through `eps_theta`. Each step with
    gradient costs one more network call. If the gradient of a step is scaled, the gradient of its drift is scaled too.

    References:
        Clark et al., arXiv:2309.17400 (DRaFT+, as NVIDIA's NeMo-Aligner implements it).
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    @property
    def mean(self) -> Tensor | None:
        """The mean over steps and samples, a scalar with a graph; `None` before the first step with gradient."""
        return torch.stack(self._steps).mean() if self._steps else None

    def add(self, drifts: Tensor) -> None:
        """Add one step's drifts, `(B,)`."""
        self._steps.append(drifts.mean())

    def measure(self, model: DiffusionModel, x: Tensor, x0: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return `(eps_theta - eps_base)^2` averaged over each latent, `(B,)`.

        Args:
            model: The model, which is called once more without its adapters.
            x: The latent at time `t`, `(B, ...)`.
            x0: The model's estimate of the clean latent.
            t: Time in the schedule's units.
            conditioning: Conditioning of the samples.
        """
        alpha, sigma = model.schedule.coefficients(t)
        # If only the network's output is detached, and not the conversion to x_0, the latent cancels out.
        with model.base():
            base = model.denoise(x, t, conditioning, output_gain=0.0)
        return (alpha / sigma * (x0 - base)).square().flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class SamplingChain:
    """Sampling from noise to image latents, with control over where gradient flows.

    A chain stores no position: `advance` and `leap` take a `State` and return the next one.

    Args:
        model: The model that predicts `x_0`, with its schedule.
        sampler: The sampler, which computes a step and the time grid.
        conditioning: Conditioning of the whole batch.
        recompute: Activations that the backward pass recomputes.
        generator: Generator of the truncation's random choices; its state must be the same on every process.
        drift: Accumulates the distance from the base model over the steps with gradient.
        probes: Called with every latent that a step returns with a graph.

    Attributes:
        grid: One `(t, s)` pair per step: the network is called at time `t`, and the step ends at time `s`.

    Raises:
        ConfigurationError: The sampler does not fit the model's schedule.
    """

    model: DiffusionModel
    sampler: Sampler
    conditioning: Conditioning
    recompute: Recompute = field(default=Recompute(), kw_only=True)
    generator: torch.Generator | None = field(default=None, kw_only=True)
    drift: PredictionDrift | None = field(default=None, kw_only=True)
    probes: tuple[Probe, ...] = field(default=(), kw_only=True)
    grid: Grid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", self.sampler.grid(self.model.schedule))

    @property
    def num_steps(self) -> int:
        """Number of network calls from noise to sample."""
        return len(self.grid)

    def start(self, noise: Tensor) -> State:
        """Return the state before the first step, with `noise` of shape `(B, ...)` as the latent."""
        return State(noise, 0)

    def advance(
        self, state: State, steps: int | None = None, *, input_gain: float = 1.0, output_gain: float = 1.0
    ) -> State:
        """Take sampling steps.

        The gains change only gradients through the network; the gradient of the latent through the sampler is not
        changed.

        Args:
            state: State to start from.
            steps: Number of steps; by default all that remain.
            input_gain: Factor on the gradient of the network's input: 1 attached, 0 detached.
            output_gain: Factor on the gradient of the network's output; with 0 the network builds no graph.

        Raises:
            ValueError: Fewer steps remain.
        """
        count = self._checked(state, steps, minimum=0)
        several = count > 1 and not torch.is_grad_enabled()
        with self.model.without_gradient() if several else nullcontext():
            for _ in range(count):
                state = self.leap(state, 1, input_gain=input_gain, output_gain=output_gain)
        return state

    def leap(self, state: State, steps: int, *, input_gain: float = 1.0, output_gain: float = 1.0) -> State:
        """Take one sampler step, with one network call, over several steps of the grid.

        Args:
            state: State to start from.
            steps: Number of grid steps, at least 1.
            input_gain: As in `advance`.
            output_gain: As in `advance`.

        Raises:
            ValueError: Fewer steps remain, or `steps` is less than 1.
        """
        end = state.step + self._checked(state, steps, minimum=1)
        transition, solver_state = self._step(state, end, input_gain, output_gain)
        return State(self._observed(end - 1, transition.rsample()), end, solver_state)

    def sample_steps(self, noise: Tensor, step_noise: Iterable[Tensor]) -> Iterator[tuple[Transition, Tensor]]:
        """Sample with given noise; yield the distribution of each step and the latent sampled from it.

        Args:
            noise: Starting noise, `(B, ...)`.
            step_noise: `num_steps` tensors `(B, ...)`; those of deterministic steps are not used.
        """
        state = self.start(noise)
        for _, fresh in zip(range(self.num_steps), step_noise, strict=True):
            transition, solver_state = self._step(state, state.step + 1, 1.0, 1.0)
            state = State(transition.rsample(fresh), state.step + 1, solver_state)
            yield transition, state.x

    def transitions_at(self, latents: Tensor, steps: Iterable[int]) -> Iterator[Transition]:
        """Yield the distribution of the next latent at the given steps of a trajectory.

        Args:
            latents: The trajectory, `(num_steps + 1, B, ...)`.
            steps: Numbers of the steps.
        """
        for step in steps:
            yield self.transition(State(latents[step], step))

    def transition(self, state: State, *, input_gain: float = 1.0, output_gain: float = 1.0) -> Transition:
        """Return the distribution of the next latent; the gains are those of `advance`."""
        return self._step(state, state.step + 1, input_gain, output_gain)[0]

    def predict(self, state: State, *, input_gain: float = 1.0, output_gain: float = 1.0) -> Tensor:
        """Return the estimate of the clean latent, `(B, ...)`; the gains are those of `advance`."""
        return self._observed(state.step, self._denoise(state, input_gain, output_gain))

    def renoise(self, x0: Tensor, steps_left: int, noise: Tensor | None = None) -> State:
        """Diffuse `x0` to the time at which `steps_left` steps remain: `x_t = alpha_t x_0 + sigma_t noise`.

        Args:
            x0: Clean latents, `(B, ...)`.
            steps_left: From 1 to `num_steps`.
            noise: Standard Gaussian noise, `(B, ...)`; by default it is sampled.

        Raises:
            ValueError: `steps_left` is out of range.
        """
        if not 1 <= steps_left <= self.num_steps:
            raise ValueError(f"steps_left={steps_left} must be between 1 and {self.num_steps}")
        step = self.num_steps - steps_left
        alpha, sigma = self.model.schedule.coefficients(self.grid[step][0])
        return State(alpha * x0 + sigma * (torch.randn_like(x0) if noise is None else noise), step)

    def repeat(self, copies: int) -> "SamplingChain":
        """Return the chain of `copies` copies of the batch: row `c * B + b` is copy `c` of sample `b`."""
        return replace(self, conditioning=self.conditioning.repeat(copies))

    def randint(self, low: int, high: int) -> int:
        """Return a random integer in `low..high`, both included, the same on every process."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def rand(self) -> float:
        """Return a random number in [0, 1), the same on every process."""
        return float(torch.rand((), generator=self.generator))

    def choose(self, weights: Sequence[float], count: int) -> list[int]:
        """Return `count` distinct random indices with probability proportional to `weights`, equal on every process."""
        table = torch.tensor(weights, dtype=torch.float64)
        return sorted(torch.multinomial(table, count, generator=self.generator).tolist())

    def _checked(self, state: State, steps: int | None, minimum: int) -> int:
        remaining = self.num_steps - state.step
        steps = remaining if steps is None else steps
        if not minimum <= steps <= remaining:
            raise ValueError(f"cannot advance {steps} steps: {remaining} of {self.num_steps} remain")
        return steps

    def _step(self, state: State, end: int, input_gain: float, output_gain: float) -> tuple[Transition, Any]:
        """Return the transition of one sampler step from `state` to grid position `end`."""
        x0 = self._denoise(state, input_gain, output_gain)
        t, s = self.grid[state.step][0], self.grid[end - 1][1]
        return self.sampler.step(self.model.schedule, state.x, x0, t, s, state.solver_state)

    def _denoise(self, state: State, input_gain: float, output_gain: float) -> Tensor:
        t, _ = self.grid[state.step]

        def denoise(x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
            with self.model.at_step(state.step, self.num_steps):  # in here, so that it applies when recomputing, too
                x0 = self.model.denoise(x, t, conditioning, input_gain=input_gain, output_gain=output_gain)
                return x0, self._drift(x, x0, t, conditioning)

        if output_gain == 0 or not torch.is_grad_enabled():
            with self.model.at_step(state.step, self.num_steps):
                return self.model.denoise(state.x, t, self.conditioning, input_gain=input_gain, output_gain=output_gain)
        self.recompute.prepare(self.model)
        slices = self.recompute.slices(len(state.x))
        if self.recompute.steps or len(slices) > 1:
            outputs = [checkpoint(denoise, state.x[s], self.conditioning[s], use_reentrant=False) for s in slices]
        else:
            outputs = [denoise(state.x, self.conditioning)]
        if self.drift is not None:
            self.drift.add(torch.cat([drift for _, drift in outputs]))
        return outputs[0][0] if len(outputs) == 1 else torch.cat([x0 for x0, _ in outputs])

    def _drift(self, x: Tensor, x0: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the drift of each sample, `(B,)`; empty if it is not measured."""
        return x.new_empty(0) if self.drift is None else self.drift.measure(self.model, x, x0, t, conditioning)

    def _observed(self, step: int, latent: Tensor) -> Tensor:
        if latent.requires_grad:
            for probe in self.probes:
                probe(step, latent)
        return latent
