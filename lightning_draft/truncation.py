"""Truncations: where along the chain the gradient flows. Each reads like the algorithm box of its paper.

A truncation maps starting noise `(B, ...)` to the latents that the reward sees, `(m B, ...)`: `m` is 1 unless the
truncation makes copies, and then row `c * B + b` is copy `c` of sample `b`. Copy 0 is the sample itself.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain


class Truncation(ABC):
    """Decides where gradient flows."""

    @abstractmethod
    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Walk the chain from `noise` and return the latents that are decoded and rewarded."""

    def gradient_steps(self, num_steps: int) -> int:
        """At most how many steps of one chain carry a gradient; step checkpointing is chosen by it."""
        return num_steps

    def trains_only_last_step(self, num_steps: int) -> bool:
        """Return whether only the network's output at the last of `num_steps` steps has a gradient."""
        return False


class Full(Truncation):
    """Back-propagate through every step.

    References:
        Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400 (DRaFT).
    """

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """All steps with gradient."""
        return chain.advance(chain.start(noise)).x


class LastK(Truncation):
    """Back-propagate through the last `k` steps.

    Args:
        k: Steps with gradient; 1 is cheapest and often learns fastest.

    References:
        Clark et al., arXiv:2309.17400 (DRaFT-K).
    """

    def __init__(self, k: int = 1) -> None:
        self.k = _at_least_one("k", k)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Walk to the last `k` steps without a graph, then with one."""
        return _last_k(chain, noise, _within(self.k, chain, "k"))

    def gradient_steps(self, num_steps: int) -> int:
        """`k`."""
        return min(self.k, num_steps)

    def trains_only_last_step(self, num_steps: int) -> bool:
        """Return whether `k` is 1."""
        return self.gradient_steps(num_steps) == 1


class LowVariance(Truncation):
    """Back-propagate through the last step, and through it again from `copies` renoised copies of the sample.

    Args:
        copies: How many; the paper uses 2.

    References:
        Clark et al., arXiv:2309.17400, algorithm 1 (DRaFT-LV).
    """

    def __init__(self, copies: int = 2) -> None:
        self.copies = _at_least_one("copies", copies)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample, renoise the detached sample to the last step, denoise the copies with gradient."""
        x0 = _last_k(chain, noise, 1)
        clones = chain.repeat(self.copies)
        renoised = clones.renoise(torch.cat([x0.detach()] * self.copies), steps_left=1)
        return torch.cat([x0, clones.advance(renoised).x])

    def gradient_steps(self, num_steps: int) -> int:
        """1: the copies lie beside the chain, not along it."""
        return 1

    def trains_only_last_step(self, num_steps: int) -> bool:
        """Return whether only the last step is trained: always."""
        return True


class ReFL(Truncation):
    """Stop at a random late step and back-propagate through one prediction of the clean latent.

    Args:
        m: The stop is uniform over the last `m` steps.

    References:
        Xu et al., "ImageReward", arXiv:2304.05977, algorithm 1 (reward feedback learning).
    """

    def __init__(self, m: int = 10) -> None:
        self.m = _at_least_one("m", m)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Walk without a graph, then predict `x_0` with one."""
        left = chain.randint(1, _within(self.m, chain, "m"))
        with torch.no_grad():
            state = chain.advance(chain.start(noise), chain.num_steps - left)
        return chain.predict(state)

    def gradient_steps(self, num_steps: int) -> int:
        """1."""
        return 1


class RandomK(Truncation):
    """Back-propagate through the last `K` steps, `K` uniform over `1..max_k` and drawn anew for every batch.

    Args:
        max_k: Upper end; by default the length of the chain.

    References:
        Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", arXiv:2310.03739
        (AlignProp, as the paper describes it).
    """

    def __init__(self, max_k: int | None = None) -> None:
        self.max_k = None if max_k is None else _at_least_one("max_k", max_k)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Draw `K`, then as `LastK`."""
        highest = chain.num_steps if self.max_k is None else _within(self.max_k, chain, "max_k")
        return _last_k(chain, noise, chain.randint(1, highest))

    def gradient_steps(self, num_steps: int) -> int:
        """`max_k`."""
        return num_steps if self.max_k is None else min(self.max_k, num_steps)

    def trains_only_last_step(self, num_steps: int) -> bool:
        """Return whether `max_k` is 1."""
        return self.gradient_steps(num_steps) == 1


class RandomSteps(Truncation):
    """Give each step's network output a gradient with a probability that rises linearly along the chain.

    Step `i` of `T` (from 0) carries a gradient with probability `(i + 1) / (T + 1)`; a step that does not is still
    walked with the latent attached. The last step is used where no step was drawn.

    References:
        The public code of AlignProp, arXiv:2310.03739, and TRL's `AlignPropTrainer`.
    """

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Walk attached throughout, freezing the network where the draw says so."""
        steps = chain.num_steps
        drawn = [chain.rand() < (i + 1) / (steps + 1) for i in range(steps)]
        drawn[-1] = drawn[-1] or not any(drawn)
        state = chain.start(noise)
        for used in drawn:
            state = chain.advance(state, 1, output_gain=float(used))
        return state.x


class DRTune(Truncation):
    """Train `k` spread-out steps with the network's input detached, and stop early at a random late step.

    The gradient reaches a trained step only along the sampler's linear path, so it cannot explode.

    Args:
        k: Steps with gradient, evenly spaced up to the stop with a random offset; all of them where fewer are left.
        m: The stop is uniform over the last `m` steps; the reward sees the prediction of `x_0` there.

    References:
        Wu et al., "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models", arXiv:2405.00760, algorithm 1.
    """

    def __init__(self, k: int = 5, m: int = 10) -> None:
        self.k = _at_least_one("k", k)
        self.m = _at_least_one("m", m)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Walk attached to the stop, then predict `x_0`."""
        _within(self.k, chain, "k")
        stop = chain.num_steps - chain.randint(1, _within(self.m, chain, "m"))
        trained = self._trained_steps(chain, stop + 1)
        state = chain.start(noise)
        for step in range(stop):
            state = chain.advance(state, 1, input_gain=0.0, output_gain=float(step in trained))
        return chain.predict(state, input_gain=0.0, output_gain=float(stop in trained))

    def gradient_steps(self, num_steps: int) -> int:
        """`k`."""
        return min(self.k, num_steps)

    def _trained_steps(self, chain: SamplingChain, length: int) -> set[int]:
        """`k` of the first `length` steps, `length // k` apart, the last one at a random distance from the end."""
        k = min(self.k, length)
        stride = length // k
        last = length - 1 - chain.randint(0, stride - 1)
        return {last - i * stride for i in range(k)}


def _last_k(chain: SamplingChain, noise: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        state = chain.advance(chain.start(noise), chain.num_steps - k)
    return chain.advance(state).x


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


def _within(value: int, chain: SamplingChain, name: str) -> int:
    if value > chain.num_steps:
        raise ValueError(f"{name}={value} exceeds the sampler's num_steps={chain.num_steps}; lower {name}")
    return value
