"""Truncations: where along the chain the gradient flows. Each is written like the algorithm in its paper.

A truncation maps starting noise `(B, ...)` to the latents that are decoded and rewarded, `(m B, ...)`. `m` is 1 unless
the truncation makes copies; then row `c * B + b` is copy `c` of sample `b`, and copy 0 is the sample itself.

The equations below write step `i` of `T` as `x_{i+1} = A_i x_i + B_i f(x_i)`, with `f` the network and `A_i`, `B_i` the
sampler's coefficients, and `sg` for a value without gradient.
"""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_draft.arguments import at_least, integer_at_least, one_of
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError


class Truncation(ABC):
    """Decide at which sampling steps, and along which paths, the gradient flows.

    In the equations, `sg` is the stop-gradient, `Tensor.detach`.
    """

    @abstractmethod
    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample from `noise` and return the latents that are decoded and rewarded, with a graph."""

    def gradient_steps(self, num_steps: int) -> int:
        """Return the largest number of steps with gradient; whether steps are recomputed by default depends on it."""
        return num_steps

    def costliest(self) -> "Truncation":
        """Return the most memory-intensive of the truncations among which this one chooses at random."""
        return self


class Full(Truncation):
    """Back-propagate through every step.

        d x_T / d theta = sum_i B_i df_i/d theta prod_{j > i} (A_j + B_j df_j/dx)

    References:
        Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400 (DRaFT).
    """

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample with gradient at every step."""
        return chain.advance(chain.start(noise)).x


class LastK(Truncation):
    """Back-propagate through the last `k` steps.

        x_{T-k} = sg(x_{T-k}); gradient as `Full` over the steps i >= T - k

    Args:
        k: Number of steps with gradient, at least 1; 1 is the cheapest and often improves the reward fastest.

    References:
        Clark et al., arXiv:2309.17400 (DRaFT-K).
    """

    def __init__(self, k: int = 1) -> None:
        self.k = integer_at_least("k", k, 1)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph up to the last `k` steps, and with a graph from there on."""
        return _last_k(chain, noise, _within(self.k, chain, "k"))

    def gradient_steps(self, num_steps: int) -> int:
        """Return `k`."""
        return min(self.k, num_steps)


class LowVariance(Truncation):
    """Back-propagate through the last step, for the sample and for `copies` copies of it to which noise is added again.

        x' = alpha sg(x_T) + sigma e,  e ~ N(0, I),  with alpha and sigma of the last step; each copy takes that step

    Args:
        copies: Number of copies, at least 1; the paper uses 2.

    References:
        Clark et al., arXiv:2309.17400, algorithm 1 (DRaFT-LV).
    """

    def __init__(self, copies: int = 2) -> None:
        self.copies = integer_at_least("copies", copies, 1)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample, renoise the detached sample to the last step, and denoise the copies with gradient."""
        x0 = _last_k(chain, noise, 1)
        clones = chain.repeat(self.copies)
        renoised = clones.renoise(torch.cat([x0.detach()] * self.copies), steps_left=1)
        return torch.cat([x0, clones.advance(renoised).x])

    def gradient_steps(self, num_steps: int) -> int:
        """Return 1, because each copy is denoised in one step."""
        return 1


class ReFL(Truncation):
    """Stop at a random late step and back-propagate through one prediction of the clean latent.

        returned latent = x_0(sg(x_i), f),  i ~ uniform{T - m, ..., T - 1}

    Args:
        m: Number of last steps, at least 1, from which the stop is chosen uniformly.

    References:
        Xu et al., "ImageReward", arXiv:2304.05977, algorithm 1 (reward feedback learning).
    """

    def __init__(self, m: int = 10) -> None:
        self.m = integer_at_least("m", m, 1)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph to the stop, then predict `x_0` with a graph."""
        left = chain.randint(1, _within(self.m, chain, "m"))
        with torch.no_grad():
            state = chain.advance(chain.start(noise), chain.num_steps - left)
        return chain.predict(state)

    def gradient_steps(self, num_steps: int) -> int:
        """Return 1."""
        return 1


class RandomK(Truncation):
    """Back-propagate through the last `K` steps, with `K` random for every batch.

        gradient as `LastK(K)`,  K ~ uniform{1, ..., max_k}

    Args:
        max_k: Largest `K`; by default the number of sampling steps.

    References:
        Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", arXiv:2310.03739
        (AlignProp, as the paper describes it).
    """

    def __init__(self, max_k: int | None = None) -> None:
        self.max_k = None if max_k is None else integer_at_least("max_k", max_k, 1)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Choose `K` at random and sample as `LastK(K)` does."""
        highest = chain.num_steps if self.max_k is None else _within(self.max_k, chain, "max_k")
        return _last_k(chain, noise, chain.randint(1, highest))

    def gradient_steps(self, num_steps: int) -> int:
        """Return `max_k`."""
        return num_steps if self.max_k is None else min(self.max_k, num_steps)

    def costliest(self) -> Truncation:
        """Return the truncation with the largest `K`."""
        return Full() if self.max_k is None else LastK(self.max_k)


class RandomSteps(Truncation):
    """Give each step's network output a gradient with a probability that rises linearly along the chain.

        d x_T / d theta = sum_{i in S} B_i df_i/d theta prod_{j > i} (A_j + [j in S] B_j df_j/dx)

    Step `i` of `T` (from 0) is in `S` with probability `(i + 1) / (T + 1)`; if `S` is empty, it contains the last step.

    References:
        The public code of AlignProp, arXiv:2310.03739, and TRL's `AlignPropTrainer`.
    """

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample with the latent attached at all steps, and the network attached at the chosen steps."""
        steps = chain.num_steps
        drawn = [chain.rand() < (i + 1) / (steps + 1) for i in range(steps)]
        drawn[-1] = drawn[-1] or not any(drawn)
        state = chain.start(noise)
        for used in drawn:
            state = chain.advance(state, 1, output_gain=float(used))
        return state.x

    def costliest(self) -> Truncation:
        """Return the truncation with all steps chosen."""
        return Full()


Coverage = Literal["uniform", "end"]


class DRTune(Truncation):
    """Train `k` of the steps with the network's input detached, and stop early at a random late step.

        d x / d theta = sum_{i in S} g B_i df_i/d theta prod_{j > i} A_j

    The gradient reaches a trained step only along the sampler's linear path, so it cannot explode. The returned latent
    is the prediction of `x_0` at the stop or, with `m=0`, the sample. `DRTune(k=4, m=0, late_bias=1, rescale=0.5)` is
    FlowBP-Sparse.

    Args:
        k: Number of trained steps, at least 1; if fewer steps come before the stop, all are trained.
        m: Number of last steps from which the stop is chosen uniformly; 0 for no early stop.
        coverage: Position of the `k` evenly spaced trained steps. `uniform`: all positions before the stop are equally
            likely. `end`: the last of them is less than one spacing before the stop, so that the first steps of a chain
            are rarely trained. Not used with `late_bias`.
        late_bias: Choose `k` distinct steps at random instead, step `i` with probability proportional to
            `(i + 1)^late_bias`; 0 is uniform.
        rescale: `rho` in `g = 1 + rho (sum_i |dt_i| / sum_{i in S} |dt_i| - 1)`, the factor on the gradient of trained
            steps that compensates for the untrained ones; `dt_i` is the time between step `i` and the next.

    References:
        Wu et al., "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models", arXiv:2405.00760, algorithm 1.
        FlowBP, arXiv:2606.11075 (FlowBP-Sparse).
    """

    def __init__(
        self,
        k: int = 5,
        m: int = 10,
        coverage: Coverage = "uniform",
        late_bias: float | None = None,
        rescale: float = 0.0,
    ) -> None:
        self.k = integer_at_least("k", k, 1)
        self.m = integer_at_least("m", m, 0)
        self.coverage = one_of("coverage", coverage, get_args(Coverage))
        self.late_bias = late_bias if late_bias is None else at_least("late_bias", late_bias, 0)
        self.rescale = at_least("rescale", rescale, 0)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample with the latent attached to the stop, then predict `x_0`."""
        self.check_steps(chain)
        early = self.m > 0
        stop = chain.num_steps - (chain.randint(1, _within(self.m, chain, "m")) if early else 0)
        trained = self.trained_steps(chain, stop + early)
        gain = self.gain(chain, trained, stop + early)
        state = chain.start(noise)
        for step in range(stop):
            state = chain.advance(state, 1, input_gain=0.0, output_gain=gain * (step in trained))
        return chain.predict(state, input_gain=0.0, output_gain=gain * (stop in trained)) if early else state.x

    def gradient_steps(self, num_steps: int) -> int:
        """Return `k`."""
        return min(self.k, num_steps)

    def check_steps(self, chain: SamplingChain) -> None:
        """Raise `ConfigurationError` if `k` exceeds the number of sampling steps."""
        _within(self.k, chain, "k")

    def trained_steps(self, chain: SamplingChain, length: int) -> set[int]:
        """Choose which of the first `length` steps are trained."""
        k = min(self.k, length)
        if self.late_bias is not None:
            return set(chain.choose([(i + 1) ** self.late_bias for i in range(length)], k))
        stride = length // k
        free = length - 1 - (k - 1) * stride if self.coverage == "uniform" else stride - 1
        last = length - 1 - chain.randint(0, free)
        return {last - i * stride for i in range(k)}

    def gain(self, chain: SamplingChain, trained: set[int], length: int) -> float:
        """Return `g`, the factor on the gradient of trained steps."""
        spans = [abs(t - s) for t, s in chain.grid[:length]]
        return 1 + self.rescale * (sum(spans) / sum(spans[i] for i in trained) - 1)


def _last_k(chain: SamplingChain, noise: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        state = chain.advance(chain.start(noise), chain.num_steps - k)
    return chain.advance(state).x


def _within(value: int, chain: SamplingChain, name: str) -> int:
    if value > chain.num_steps:
        raise ConfigurationError(f"{name}={value} exceeds the sampler's num_steps={chain.num_steps}; lower {name}")
    return value
