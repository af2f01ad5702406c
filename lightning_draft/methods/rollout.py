"""Rollouts: trajectories of a stochastic sampler with their rewards, and the buffer of the current rollout.

Shapes: `T` sampling steps, `S` of them stochastic, `N` samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.distributed import world_size
from lightning_draft.models.base import DiffusionModel
from lightning_draft.seeds import derive_seed


class Trajectories(NamedTuple):
    """Samples, and what is known about their steps.

    Args:
        latents: `(L, N, ...)`; the last of them are the samples.
        log_probs: Log-probabilities of the stochastic steps, `(S, N)`; `S` is 0 if they are not used.
        means: Means of the stochastic steps, `(S, N, ...)`, if they are used.
    """

    latents: Tensor
    log_probs: Tensor
    means: Tensor | None = None


class SampleScores(NamedTuple):
    """Scores of some samples.

    Args:
        rewards: `(B,)`.
        components: Those of the reward's components by name.
        evaluated: Those of the evaluation rewards that training needs, by name.
        features: What the advantage estimator compares of the images, `(B, ...)`, if it does.
    """

    rewards: Tensor
    components: dict[str, Tensor]
    evaluated: dict[str, Tensor]
    features: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """Trajectories, their rewards and advantages.

    Args:
        number: Number of the rollout in the run, from 0.
        step: Number of optimizer steps before it was collected.
        prompts: One per sample; samples of one prompt are next to each other.
        latents: From noise to sample, `(T + 1, N, ...)`; only the samples, `(1, N, ...)`, if training needs no others.
        log_probs: Log-probabilities of the stochastic steps under the model that sampled them, `(S, N)`; `S` is 0 if
            they are not used.
        rewards: `(N,)`.
        advantages: `(N,)`.
        summary: Metrics to log.
        ref_log_probs: As `log_probs`, under the base model, if the objective needs them.
        old_means: Means of the stochastic steps, `(S, N, ...)`, if the objective needs them.
        step_advantages: Advantages of the stochastic steps, `(S, N)`, if they differ from those of the samples.
        kl_gate: Which samples have a KL term, bool `(N,)`; `None` for all.
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
    old_means: Tensor | None = None
    step_advantages: Tensor | None = None
    kl_gate: Tensor | None = None

    def to(self, device: torch.device | str) -> "Rollout":
        """Return the rollout on a device; it is copied only if it is on another device."""
        if self.latents.device == torch.device(device):
            return self
        state: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.state_dict().items()
        }
        return Rollout(**state)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as types that can be loaded with `weights_only=True`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class LogProbGradients:
    """The value of an objective, and its gradient with respect to the log-probabilities.

    Args:
        weights: `dL / d log_probs`, `(S, N)`.
        loss: `L`, scalar.
    """

    weights: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Minibatch:
    """Some stochastic steps of some samples of a rollout.

    Args:
        samples: Which of the `N` samples.
        steps: Which of the `S` stochastic steps.
        fraction: Their fraction of the `N S` log-probabilities, in (0, 1].
    """

    samples: slice
    steps: slice
    fraction: float


class RolloutBuffer:
    """The current rollout, the position in it, and the values that are shared by its training steps.

    A rollout is used in several training steps, one minibatch each. The buffer counts rollouts and training steps
    itself, so that a resumed run depends only on the checkpoint.

    Attributes:
        number: Number of the current rollout, from 0, from which its noise is derived.
        index: Number of the next training step on this rollout, from 0.
        rollout: The rollout that was collected last, if any.
    """

    def __init__(self) -> None:
        self.number = 0
        self.index = 0
        self.rollout: Rollout | None = None
        self._gradients: tuple[int, LogProbGradients] | None = None
        self._sums: dict[str, Tensor] = {}
        self._sums_step = -1

    def current(self, device: torch.device, collect: Callable[[int], Rollout]) -> Rollout:
        """Return the current rollout on a device; `collect` is called with its number if there is none yet."""
        if self.rollout is None or self.rollout.number != self.number:
            self.rollout, self._gradients = collect(self.number), None
        self.rollout = self.rollout.to(device)
        return self.rollout

    def log_prob_gradients(self, step: int, compute: Callable[[], LogProbGradients]) -> LogProbGradients:
        """Return the gradients of an optimizer step, computed once for all its minibatches."""
        if self._gradients is None or self._gradients[0] != step:
            self._gradients = step, compute()
        return self._gradients[1]

    def averages(self, values: Mapping[str, Tensor], fraction: float, step: int) -> dict[str, Tensor]:
        """Return the means over the minibatches of the current optimizer step, weighted by their fractions."""
        if self._sums_step != step:
            self._sums, self._sums_step = {}, step
        for name, value in {"fraction": torch.ones(()), **values}.items():
            self._sums[name] = self._sums.get(name, 0) + fraction * value
        return {name: self._sums[name] / self._sums["fraction"] for name in values}

    def advance(self, training_steps: int) -> None:
        """Move to the next training step of the rollout, or after the last one to the next rollout."""
        self.index += 1
        if self.index >= training_steps:
            self.number, self.index = self.number + 1, 0

    def drop_rollout(self) -> None:
        """Drop the rollout and the averages of its step; it is collected again, and the position does not change."""
        self.rollout = self._gradients = None
        self._sums_step = -1

    def reset(self) -> None:
        """Start at the first rollout."""
        self.drop_rollout()
        self.number = self.index = 0

    def extra_state(self) -> dict[str, Any]:
        """Return the position, and the rollout if training steps on it remain; nothing is copied."""
        return {"number": self.number, "index": self.index, "rollout": self.rollout if self.index else None}

    @staticmethod
    def state_dict(extra_state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert an `extra_state` to types that can be loaded with `weights_only=True`, on the CPU."""
        rollout = extra_state["rollout"]
        return {**extra_state, "rollout": None if rollout is None else rollout.to("cpu").state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.number, self.index = state["number"], state["index"]
        rollout = state["rollout"]
        self.rollout = None if rollout is None else Rollout(**rollout)

    def restore(self, saved: Sequence[Mapping[str, Any]], rank: int) -> None:
        """Restore the state of a process; with another number of processes the rollout is collected again.

        Args:
            saved: The `state_dict` of each process that wrote the checkpoint.
            rank: This process.
        """
        size = world_size()
        if len(saved) == size:
            self.load_state_dict(saved[rank])
            return
        self.load_state_dict({**saved[0], "rollout": None})
        rank_zero_warn(
            f"the checkpoint is of {len(saved)} processes and there are {size} now: the rollout is collected again, "
            "and this run will differ from an uninterrupted one"
        )


def concatenate(scores: Sequence[SampleScores]) -> SampleScores:
    """Return the scores of all samples from those of parts."""
    components, evaluated = (
        {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
        for parts in ([each.components for each in scores], [each.evaluated for each in scores])
    )
    features = [each.features for each in scores if each.features is not None]
    rewards = torch.cat([each.rewards for each in scores])
    return SampleScores(rewards, components, evaluated, torch.cat(features) if features else None)


def minibatches(
    samples: int, steps: int, micro_batch_size: int | None, timesteps_per_minibatch: int | None
) -> list[Minibatch]:
    """Split a rollout of `samples` by `steps` into minibatches, all steps of some samples before the next ones."""
    return [
        Minibatch(some, few, (some.stop - some.start) * (few.stop - few.start) / (samples * steps))
        for some in slices(samples, micro_batch_size)
        for few in slices(steps, timesteps_per_minibatch)
    ]


def slices(length: int, size: int | None) -> list[slice]:
    """Split `0..length` into slices of `size`, of which the last may be shorter; `None` gives one slice."""
    size = length if size is None else size
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def summarize(rewards: Tensor, advantages: Tensor, group: int) -> dict[str, float]:
    """Return the logged metrics of a rollout.

    Args:
        rewards: `(N,)`.
        advantages: `(N,)`.
        group: Number of consecutive samples with the same prompt.

    Returns:
        `train/reward`: mean. `train/reward_within_prompts`: mean of the standard deviations by prompt.
        `train/reward_worst_prompt`, `train/reward_best_prompt`: extremes of the means by prompt. `train/advantage_std`:
        standard deviation. `train/zero_advantage_groups`: fraction of prompts whose advantages are all 0.
    """
    by_prompt, advantages_by_prompt = rewards.view(-1, group), advantages.view(-1, group)
    return {
        "train/reward": float(rewards.mean()),
        "train/reward_within_prompts": float(by_prompt.std(1, correction=0).mean()),
        "train/reward_worst_prompt": float(by_prompt.mean(1).amin()),
        "train/reward_best_prompt": float(by_prompt.mean(1).amax()),
        "train/advantage_std": float(advantages.std(correction=0)),
        "train/zero_advantage_groups": float((advantages_by_prompt == 0).all(1).float().mean()),
    }


def sample_noise(
    model: DiffusionModel, count: int, seeds: Sequence[int], start_seeds: Sequence[int] | None = None
) -> Tensor:
    """Return Gaussian latents `(count, N, ...)`; each sample has its own seed, independent of the other samples.

    Args:
        model: The diffusion model.
        count: Number of latents per sample.
        seeds: One per sample.
        start_seeds: Seeds of the first latent of each sample; by default its own.
    """
    each = [model.noise(count, torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack(each, 1)
    if start_seeds is not None:
        noise[0] = torch.cat([model.noise(1, torch.Generator().manual_seed(seed)) for seed in start_seeds])
    return noise


def repeat_prompts(prompts: Sequence[str], samples_per_prompt: int) -> list[str]:
    """Repeat every prompt `samples_per_prompt` times in a row."""
    return [prompt for prompt in prompts for _ in range(samples_per_prompt)]


def rollout_seeds(seed: int, number: int, rank: int, samples: int, group: int) -> tuple[list[int], list[int]]:
    """Return the seed of each sample of rollout `number`, and that of the starting noise its prompt can share."""
    own = [derive_seed(seed, number, rank, i) for i in range(samples)]
    return own, [derive_seed(seed, number, rank, i // group, _START) for i in range(samples)]


_START = 1  # distinguishes the shared starting noise of a prompt from the noise of its samples
