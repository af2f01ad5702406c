"""Truncations that return the sampled latents, with the gradient of a shorter surrogate trajectory.

The notation is that of `lightning_draft.truncation`.
"""

import math
from collections.abc import Sequence

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from lightning_draft.arguments import boolean, in_range, integer_at_least, positive
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
        super().__init__(integer_at_least("k", k, 2), m=0, late_bias=late_bias, rescale=rescale)
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
        return _weighted(to_end, end, to_j, at_j.x, self.min_distance)

    def gradient_steps(self, num_steps: int) -> int:
        """Return 2."""
        return min(2, num_steps)


class FlowBPLagrange(Truncation):
    """FlowBP-Lagrange: as LeapAlign, with the velocity between two steps interpolated from steps of the sample.

    With `u = sigma / (alpha + sigma)`, each latent `y = x / (alpha + sigma) = (1 - u) x_0 + u eps` is that of a
    rectified flow with the velocity `v = eps - x_0`, on which DDIM is Euler's method, too:

        y_j = y_k + sum_i w_i v_i,    w_i = integral of l_i(u) from u_k to u_j
        y_T = y_j + sum_i w_i' v_i,   with `y_j` of the sample, the gradient of the estimate, and `w_i'` from u_j to u_T

    `k < j` are two distinct random steps, and `l_i` the Lagrange polynomials of up to `order` evenly spaced steps of an
    interval, including its first one. The velocities are those of the sample, except that the first one of each
    interval is computed with gradient, at `j` with the gradient of the network's input multiplied by `discount`, and
    the second one at the detached latent, with its gradient multiplied by `second`. The weight of the gradient is that
    of `LeapAlign`.

    Args:
        order: Largest number of interpolated velocities in an interval, at least 1; with 1 each jump is a large step.
        discount: Factor on the gradient through the network call at `j`, in [0, 1].
        second: Factor on the gradient of the second velocity of each interval, in [0, 1]; 0 saves its network call.
        min_distance: Lower bound of the distance of `LeapAlign`, positive.

    References:
        FlowBP, arXiv:2606.11075 (FlowBP-Lagrange), and the authors' code, in which the steps `k` and `j` are from a
        Dirichlet distribution instead of uniform.
    """

    def __init__(self, order: int = 3, discount: float = 0.1, second: float = 0.25, min_distance: float = 0.2) -> None:
        self.order = integer_at_least("order", order, 1)
        self.discount = in_range("discount", discount, 0, 1)
        self.second = in_range("second", second, 0, 1)
        self.min_distance = positive("min_distance", min_distance)

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph, then integrate the two interpolants with a graph."""
        _check_two_steps(chain, self)
        k, j = chain.choose([1.0] * chain.num_steps, 2)
        with torch.no_grad():
            states = [chain.start(noise)]
            for _ in range(chain.num_steps):
                states.append(chain.advance(states[-1], 1))
        path = [state.x for state in states]
        to_j = self._jump(chain, path, path[k], (k, j), input_gain=0.0)
        to_end = self._jump(chain, path, straight_through(to_j, path[j]), (j, chain.num_steps), self.discount)
        return _weighted(to_end, path[-1], to_j, path[j], self.min_distance)

    def gradient_steps(self, num_steps: int) -> int:
        """Return 4, or 2 without the second velocities."""
        return min(2 if self.second == 0 or self.order == 1 else 4, num_steps)

    def _jump(
        self, chain: SamplingChain, path: Sequence[Tensor], x: Tensor, interval: tuple[int, int], input_gain: float
    ) -> Tensor:
        """Return the latent at the end of an interval of steps that starts at `x`."""
        start, end = interval
        steps, frames = evenly_spaced(start, end, self.order), [_frame(chain, t) for t, _ in chain.grid]
        scale, u_end = _frame(chain, chain.grid[end - 1][1])
        weights = lagrange_weights([frames[i][1] for i in steps], frames[start][1], u_end)
        total = y = x / frames[start][0]
        for index, (i, weight) in enumerate(zip(steps, weights, strict=True)):
            own, (next_scale, next_u) = path[i] / frames[i][0], _frame(chain, chain.grid[i][1])
            if index == 0:
                v = (y - chain.predict(State(x, i), input_gain=input_gain)) / frames[i][1]
            elif index == 1 and self.second > 0:
                v = scale_gradient((own - chain.predict(State(path[i], i))) / frames[i][1], self.second)
            else:
                v = (path[i + 1] / next_scale - own) / (next_u - frames[i][1])
            total = total + weight * v
        return total * scale


def _frame(chain: SamplingChain, t: float) -> tuple[float, float]:
    """Return `alpha + sigma` and `sigma / (alpha + sigma)` at time `t`."""
    alpha, sigma = chain.model.schedule.coefficients(t)
    return alpha + sigma, sigma / (alpha + sigma)


def evenly_spaced(start: int, end: int, count: int) -> list[int]:
    """Return at most `count` integers of `[start, end)`, evenly spaced up to rounding, the first of them `start`."""
    last = min(count, end - start) - 1
    return [start + (i * (end - 1 - start) + last // 2) // max(last, 1) for i in range(last + 1)]


def lagrange_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """Return the integrals of the Lagrange polynomials of distinct points from `start` to `end`."""
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        numerator = Polynomial.fromroots(others) if others else Polynomial([1.0])
        integral = numerator.integ()
        weights.append(float(integral(end) - integral(start)) / math.prod(point - other for other in others))
    return weights


class DirectAlign(Truncation):
    """Renoise the sample with the starting noise of its chain, take one step with gradient, and remove the noise.

        x_t = alpha_t sg(x_T) + sigma_t e,   x_s = A_t x_t + B_t f(x_t),   returned latent = (x_s - sigma_s e) / alpha_s

    with `e` the starting noise and `t` a random step from time `t` to `s`. With the reward `Relative` it is SRPO.

    With `inversion`, a copy takes the step from `s` up to `t`, and its reward is decreased:

        x_s = alpha_s sg(x_T) + sigma_s e,   x_t = alpha_t x_0(x_s) + sigma_t eps(x_s),   (x_t - sigma_t e) / alpha_t

    Its gradient is multiplied by -1. For `Relative` with `k` = 0 this is SRPO's exchange of the positive and the
    negative text.

    Args:
        low: Smallest number of steps that remain at the renoised latent, at least 1.
        high: Largest number of remaining steps; by default one less than all, because `x_t` is nearly pure noise at the
            first.
        inversion: Whether to add the copy that takes the step up; `low` must then be at least 2.

    References:
        SRPO, arXiv:2509.06942 (Direct-Align).
    """

    def __init__(self, low: int = 1, high: int | None = None, inversion: bool = False) -> None:
        self.inversion = boolean("inversion", inversion)
        advice = "write 2 or more, because inversion steps up from the next step" if inversion else ""
        self.low = integer_at_least("low", low, 1 + inversion, advice)
        self.high = (
            None if high is None else integer_at_least("high", high, low, f"write {low} or more, because low is {low}")
        )

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        """Sample without a graph, then renoise, and take one step with a graph."""
        _check_two_steps(chain, self)
        high = chain.num_steps - 1 if self.high is None else self.high
        if not self.low <= high <= chain.num_steps - self.inversion:
            limit = f"num_steps={chain.num_steps}" + " less 1" * self.inversion
            raise ConfigurationError(
                f"low={self.low} and high={high} must be in this order between {1 + self.inversion} and the sampler's "
                f"{limit}"
            )
        with torch.no_grad():
            x0 = chain.advance(chain.start(noise)).x
        left = chain.randint(self.low, high)
        state = chain.advance(chain.renoise(x0, left, noise), 1)
        alpha, sigma = chain.model.schedule.coefficients(chain.grid[state.step - 1][1])
        denoised = (state.x - sigma * noise) / alpha
        return torch.cat([denoised, self._inverted(chain, x0, left, noise)]) if self.inversion else denoised

    def gradient_steps(self, num_steps: int) -> int:
        """Return 1, or 2 with `inversion`."""
        return 1 + self.inversion

    def _inverted(self, chain: SamplingChain, x0: Tensor, left: int, noise: Tensor) -> Tensor:
        """Return the copy that takes the step up, with its gradient multiplied by -1."""
        state, coefficients = chain.renoise(x0, left - 1, noise), chain.model.schedule.coefficients
        (alpha_s, sigma_s), (alpha_t, sigma_t) = (coefficients(chain.grid[i][0]) for i in (state.step, state.step - 1))
        estimate = chain.predict(state)
        eps = (state.x - alpha_s * estimate) / sigma_s
        return scale_gradient(estimate + sigma_t / alpha_t * (eps - noise), -1.0)


def _weighted(to_end: Tensor, end: Tensor, to_j: Tensor, at_j: Tensor, min_distance: float) -> Tensor:
    """Return `end` with the gradient of its estimate over the sum of both estimates' distances from the sample."""
    pairs = ((to_j, at_j), (to_end, end))
    distances = [(a.detach() - b).abs().flatten(1).mean(1).clamp(min=min_distance) for a, b in pairs]
    weight = 1 / (distances[0] + distances[1])
    return scale_gradient(straight_through(to_end, end), weight.view(-1, *[1] * (end.dim() - 1)))


def _check_two_steps(chain: SamplingChain, truncation: Truncation) -> None:
    if chain.num_steps < 2:
        raise ConfigurationError(
            f"{type(truncation).__name__} needs at least 2 sampling steps, and the sampler has num_steps=1"
        )
