"""Gradient matching: targets for the difference from the base model, computed from gradients of the reward.

Notation: `x_k` is the latent before step `k` of `T`, `mu` the mean of the sampler's step, `std_k` its standard
    deviation, `x0(x)` the model's estimate of the clean latent, `u` the network's prediction, `r` the reward of a
    decoded latent. Values of the base model have the subscript `base`. Targets have no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_draft.arguments import positive
from lightning_draft.chain import SamplingChain, State
from lightning_draft.models.base import x0_slope


@dataclass(frozen=True)
class Trajectory:
    """Sampled latents and the gradient of the reward.

    Args:
        chain: Chain of the current model.
        latents: From noise to sample, `(T + 1, B, ...)`.
        reward_gradient: Map from clean latents `(B, ...)` to the gradients of their rewards, `(B, ...)`.
    """

    chain: SamplingChain
    latents: Tensor
    reward_gradient: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Residual:
    """Difference from the base model at one step.

    Args:
        prediction: `u - u_base`, `(B, ...)`, with a graph.
        mean: `mu - mu_base`, `(B, ...)`, with a graph.
        std: Standard deviation of the step.
    """

    prediction: Tensor
    mean: Tensor
    std: float


class GradientMatching(ABC):
    """A regression of the difference from the base model on gradients of the reward.

    Attributes:
        needs_noise: Whether only stochastic steps can be trained.
        assumes_memoryless: Whether the optimum is known only for a memoryless sampler.
    """

    needs_noise: bool = True
    assumes_memoryless: bool = False

    @abstractmethod
    def targets(self, trajectory: Trajectory, steps: Sequence[int]) -> list[Tensor]:
        """Return the target of each of the steps, which are in increasing order, `(B, ...)`."""

    @abstractmethod
    def loss(self, residual: Residual, target: Tensor) -> Tensor:
        """Return the loss of each sample at one step, `(B,)`."""


class AdjointMatching(GradientMatching):
    """Stochastic optimal control: match the lean adjoint, which is back-propagated through the base model's steps.

        a_T = -scale grad r(x_T),  a_k = (d mu_base(x_k) / dx)^T a_{k+1}
        L = mean_k |(mu - mu_base)(x_k) / std_k + std_k a_{k+1}|^2

    The optimum samples from `p_base exp(scale r) / Z` if the sampler is memoryless: `DDIM(eta=1)`, or
    `FlowSDE(noise_level=sqrt(2))`.

    Args:
        scale: Factor on the reward, positive.

    Raises:
        ConfigurationError: `scale` is not positive.

    References:
        Domingo-Enrich et al., "Adjoint Matching", arXiv:2409.08861.
    """

    assumes_memoryless = True

    def __init__(self, scale: float = 100.0) -> None:
        self.scale = positive("scale", scale)

    def targets(self, trajectory: Trajectory, steps: Sequence[int]) -> list[Tensor]:
        """Return the adjoints after the steps.

        Each step after the first trained one needs a forward and a backward pass of the base model.
        """
        chain, latents = trajectory.chain, trajectory.latents
        adjoint, found = -self.scale * trajectory.reward_gradient(latents[-1]), {}

        def pull_back(step: int) -> Tensor:
            return pulled_back(lambda x: chain.transition(State(x, step)).mean, latents[step], adjoint)

        with chain.model.base():
            for step in range(chain.num_steps - 1, steps[0] - 1, -1):
                found[step] = adjoint
                adjoint = pull_back(step) if step > steps[0] else adjoint
        return [found[step] for step in steps]

    def loss(self, residual: Residual, target: Tensor) -> Tensor:
        """Return the squared distance, summed over the latent's dimensions as the authors do."""
        return (residual.mean / residual.std + residual.std * target).square().flatten(1).sum(1)


class NablaGFlowNet(GradientMatching):
    """Residual score matching: the score of a step changes by the reward's gradient at the estimate after the step.

        g_{k+1} = scale alpha_{k+1}^2 grad r(x0(x_{k+1})) with respect to x_{k+1}
        L = mean_k mean |(mu - mu_base)(x_k) / std_k^2 - g_{k+1}|^2

    with `alpha_{k+1}` the signal level after the step, and `x0(x_T) = x_T`. The flow network of the paper is omitted,
    as with the authors' option `no_flow`.

    Args:
        scale: Factor on the reward, positive.

    Raises:
        ConfigurationError: `scale` is not positive.

    References:
        Liu et al., "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets",
        arXiv:2412.07775, and the authors' code.
    """

    def __init__(self, scale: float = 1000.0) -> None:
        self.scale = positive("scale", scale)

    def targets(self, trajectory: Trajectory, steps: Sequence[int]) -> list[Tensor]:
        """Return the scaled gradients; each step except the last needs one forward and backward pass of the network."""
        return [self.scale * self._gradient(trajectory, step + 1) for step in steps]

    def loss(self, residual: Residual, target: Tensor) -> Tensor:
        """Return the squared distance, averaged over the latent's dimensions as the authors do."""
        return (residual.mean / residual.std**2 - target).square().flatten(1).mean(1)

    def _gradient(self, trajectory: Trajectory, step: int) -> Tensor:
        chain, x = trajectory.chain, trajectory.latents[step]
        if step == chain.num_steps:
            return trajectory.reward_gradient(x)
        alpha, _ = chain.model.schedule.coefficients(chain.grid[step][0])
        with torch.no_grad():
            gradient = trajectory.reward_gradient(chain.predict(State(x, step)))
        return alpha**2 * pulled_back(lambda x: chain.predict(State(x, step)), x, gradient)


class VGGFlow(GradientMatching):
    """Value gradient guidance: the network's prediction moves along the reward's gradient at the estimate.

        g = grad r(x0(x_k)) / max(1, |grad r(x0(x_k))| / clip)
        L = mean_k mean |(u - u_base)(x_k) - sign alpha_k^2 scale g|^2

    with `sign` that of `d x0 / d u`: the target of a flow, whose `alpha_k` is `1 - t`, is `v_base - (1 - t)^2 scale g`.
    The value network of the paper is omitted. The sampler can be deterministic.

    Args:
        scale: Factor on the clipped gradient, positive; the paper uses 1e3.
        clip: Largest norm of a sample's gradient, positive.

    Raises:
        ConfigurationError: An option is not positive.

    References:
        Liu et al., "Value Gradient Guidance for Flow Matching Alignment", arXiv:2512.05116.
    """

    needs_noise = False

    def __init__(self, scale: float = 1000.0, clip: float = 1.0) -> None:
        self.scale = positive("scale", scale)
        self.clip = positive("clip", clip)

    def targets(self, trajectory: Trajectory, steps: Sequence[int]) -> list[Tensor]:
        """Return the change of the prediction at each step; each step needs one network call."""
        return [self._target(trajectory, step) for step in steps]

    def loss(self, residual: Residual, target: Tensor) -> Tensor:
        """Return the squared distance, averaged over the latent's dimensions."""
        return (residual.prediction - target).square().flatten(1).mean(1)

    def _target(self, trajectory: Trajectory, step: int) -> Tensor:
        model, t = trajectory.chain.model, trajectory.chain.grid[step][0]
        alpha, sigma = model.schedule.coefficients(t)
        with torch.no_grad():
            gradient = trajectory.reward_gradient(trajectory.chain.predict(State(trajectory.latents[step], step)))
        norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
        sign = 1 if x0_slope(alpha, sigma, model.prediction) > 0 else -1
        clipped: Tensor = gradient / (norm / self.clip).clamp(min=1)
        return sign * alpha**2 * self.scale * clipped


def pulled_back(function: Callable[[Tensor], Tensor], x: Tensor, vector: Tensor) -> Tensor:
    """Return `(d function(x) / dx)^T vector`, without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, vector)[0]
