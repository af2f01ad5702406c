"""Truncations that return the sampled latents, with the gradient of a shorter surrogate trajectory.

The notation is that of `lightning_draft.truncation`.
"""

import torch
from torch import Tensor

from lightning_draft.arguments import at_least, in_range, positive
from lightning_draft.chain import SamplingChain, State
from lightning_draft.errors import ConfigurationError
from lightning_draft.gradients import scale_gradient, straight_through
from lightning_draft.truncation import DRTune, Truncation


class FlowBPBridge(DRTune):
    """FlowBP-Bridge: as FlowBP-Sparse, with the network's input partly attached at one trained step.

        d x_T / d theta = sum_{i in S} g B_i df_i/d theta prod_{l > i} (A_l + [l = j] bridge g B_l df_l/dx)

    The bridge `j` is uniform over the trained steps other than the first.

    Args:
        k: Number of trained steps, at least 2.
        late_bias: Step `i` is chosen with probability proportional to `(i + 1)^late_bias`.
        rescale: As in `DRTune`.
        bridge: Factor on the gradient of the network's input at `j`, in [0, 1]; with 0 it is FlowBP-Sparse.

    References:
        FlowBP, arXiv:2606.11075 (FlowBP-Bridge). The authors' distribution of `j` is not known.
    """

    def __init__(self, k: int = 5, late_bias: float = 4.0, rescale: float = 0.5, bridge: float = 0.5) -> None:
        super().__init__(at_least("k", k, 2), m=0, late_bias=late_bias, rescale=rescale)
        self.bridge = in_range("bridge", bridge, 0, 1)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample with the latent attached throughout."""
        self.check_steps(chain)
        trained = self.trained_steps(chain, chain.num_steps)
        gain = self.gain(chain, trained, chain.num_steps)
        j = sorted(trained)[chain.randint(1, len(trained) - 1)]
        state = chain.start(noise)
        for step in range(chain.num_steps):
            into, out = self.bridge * (step == j), gain * (step in trained)
            state = chain.advance(state, 1, input_gain=into, output_gain=out)
        return state.x


class LeapAlign(Truncation):
    """Back-propagate through two large sampler steps: from step `k` to step `j`, and from `j` to the end.

        y_j = A_{kj} sg(x_k) + B_{kj} f(sg(x_k)),          x_j = sg(x_j) + y_j - sg(y_j)
        y_T = A_{jT} x_j + B_{jT} f(x_j; discount),        returned latent = x_T with the gradient w y_T
        w = 1 / (d(y_j, x_j) + d(y_T, x_T)),               d(a, b) = max(min_distance, mean |a - b|) of each sample

    `k < j` are two distinct random steps; `discount` scales the gradient of the network's input at `j`. Trajectories
    that two large steps approximate well have a larger weight.

    Args:
        discount: Factor on the gradient through the second network call, in [0, 1].
        min_distance: Lower bound of the distance `d`, positive.

    References:
        LeapAlign, arXiv:2604.15311.
    """

    def __init__(self, discount: float = 0.3, min_distance: float = 0.1) -> None:
        self.discount = in_range("discount", discount, 0, 1)
        self.min_distance = positive("min_distance", min_distance)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph, then take the two large steps with a graph."""
        _check_two_steps(chain, self)
        k, j = chain.choose([1.0] * chain.num_steps, 2)
        with torch.no_grad():
            at_k = chain.advance(chain.start(noise), k)
            at_j = chain.advance(at_k, j - k)
            end = chain.advance(at_j).x
        to_j = chain.leap(State(at_k.x, k), j - k).x
        x_j = straight_through(to_j, at_j.x)
        to_end = chain.leap(State(x_j, j), chain.num_steps - j, input_gain=self.discount).x
        weight = 1 / (self._distance(to_j, at_j.x) + self._distance(to_end, end))
        return scale_gradient(straight_through(to_end, end), weight.view(-1, *[1] * (end.dim() - 1)))

    def gradient_steps(self, num_steps: int) -> int:
        """Return 2."""
        return min(2, num_steps)

    def _distance(self, estimate: Tensor, actual: Tensor) -> Tensor:
        return (estimate.detach() - actual).abs().flatten(1).mean(1).clamp(min=self.min_distance)


class DirectAlign(Truncation):
    """Renoise the sample with the starting noise of its chain, take one step with gradient, and remove the noise.

        x_t = alpha_t sg(x_T) + sigma_t e,   x_s = A_t x_t + B_t f(x_t),   returned latent = (x_s - sigma_s e) / alpha_s

    with `e` the starting noise and `t` a random step. This is the gradient of SRPO without its relative reward.

    Args:
        low: Smallest number of steps that remain at the renoised latent, at least 1.
        high: Largest number of remaining steps; by default one less than all, because `x_t` is nearly pure noise at the
            first.

    References:
        SRPO, arXiv:2509.06942 (Direct-Align).
    """

    def __init__(self, low: int = 1, high: int | None = None) -> None:
        self.low = at_least("low", low, 1)
        self.high = None if high is None else at_least("high", high, low, f"low is {low}")

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph, then renoise, and take one step with a graph."""
        _check_two_steps(chain, self)
        high = chain.num_steps - 1 if self.high is None else self.high
        if not self.low <= high <= chain.num_steps:
            raise ConfigurationError(
                f"low={self.low} and high={high} must be between 1 and the sampler's num_steps={chain.num_steps}"
            )
        with torch.no_grad():
            x0 = chain.advance(chain.start(noise)).x
        left = chain.randint(self.low, high)
        state = chain.advance(chain.renoise(x0, left, noise), 1)
        alpha, sigma = chain.model.schedule.coefficients(chain.grid[state.step - 1][1])
        return (state.x - sigma * noise) / alpha

    def gradient_steps(self, num_steps: int) -> int:
        """Return 1."""
        return 1


def _check_two_steps(chain: SamplingChain, truncation: Truncation) -> None:
    if chain.num_steps < 2:
        raise ConfigurationError(
            f"{type(truncation).__name__} needs at least 2 sampling steps, and the sampler has num_steps=1"
        )
