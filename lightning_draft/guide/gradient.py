"""Guidance by the gradient of the reward at each sampling step."""

from typing import Any

import torch
from torch import Tensor

from lightning_draft.arguments import finite, in_range, integer_at_least
from lightning_draft.chain import SamplingChain, State
from lightning_draft.guide.latent_score import LatentScore


@torch.no_grad()
def gradient_guidance(
    chain: SamplingChain, noise: Tensor, reward: LatentScore, scale: float = 1.0, min_alpha: float = 0.05
) -> Tensor:
    """Add the gradient of the reward of the predicted clean latent to the score function; return latents `(B, ...)`.

        score' = score + s g,  g = grad_{x_t} r(x0_hat(x_t));  so  x0_hat' = x0_hat + s (sigma_t^2 / alpha_t) g

    This is classifier guidance, `eps' = eps - s sigma_t g`, with the reward of the predicted `x_0` in place of the
    classifier's log-probability. If the network were exact, the shift of `x0_hat` would be `s Cov(x_0 | x_t) grad r`:
    the gradient passes through the network and is restricted to directions in which the data vary.

    `sigma_t^2 / alpha_t` is unbounded at the noise end, where a network's prediction is not exact enough for this
    factor; steps with a smaller `alpha_t` than `min_alpha` are therefore not guided.

    Args:
        chain: The sampling chain.
        noise: Starting noise, `(B, ...)`.
        reward: The differentiable reward of clean latents.
        scale: `s`; 1 if the reward is a log-probability. It is relative to the units of the reward; 0 is sampling.
        min_alpha: Smallest `alpha_t` at which steps are guided, in (0, 1].

    References:
        Guo et al., "Gradient Guidance for Diffusion Models", arXiv:2404.14743 (the gradient through the prediction).
        Dhariwal and Nichol, arXiv:2105.05233, algorithm 2 (classifier guidance). Chung et al., arXiv:2209.14687 (DPS).
    """
    finite("scale", scale)
    in_range("min_alpha", min_alpha, 1e-6, 1)
    state = chain.start(noise)
    for t, _ in chain.grid:
        alpha, sigma = chain.model.schedule.coefficients(t)
        if alpha < min_alpha:
            state = chain.advance(state, 1)
            continue
        with torch.enable_grad():
            x = state.x.detach().requires_grad_()
            x0 = chain.predict(State(x, state.step, state.solver_state))
            (gradient,) = torch.autograd.grad(reward(x0).sum(), x)
        x, solver_state = take_step(chain, state, x0.detach() + scale * sigma**2 / alpha * gradient)
        state = State(x, state.step + 1, solver_state)
    return state.x


@torch.no_grad()
def norm_matched_guidance(
    chain: SamplingChain, noise: Tensor, reward: LatentScore, scale: float = 0.1, inner_steps: int = 1
) -> Tensor:
    """Move each sampling step along the gradient by a fraction of the step's length; return latents `(B, ...)`.

        x_s = x' + c |x_t - x'| g / |g|,  g = grad_{x0_hat} r(x0_hat(x_t)),  x' = sampler(x_t, x0_hat)

    The norms are those of each sample, so that the scale does not depend on the units of the reward. The gradient does
    not pass through the network. With `inner_steps` greater than 1, the step is repeated from its own result at the
    same `t`, as in the authors' code (there only at high noise); each repetition denoises further, so this is meant for
    long chains.

    Args:
        chain: The sampling chain.
        noise: Starting noise, `(B, ...)`.
        reward: The differentiable reward of clean latents.
        scale: `c`; the authors use 0.0015 to 0.1 with 1000 steps. 0 is sampling.
        inner_steps: Number of times each step is taken, at least 1.

    References:
        Yang et al., "PGDiff: Guiding Diffusion Models for Versatile Face Restoration via Partial Guidance",
        arXiv:2309.10810, and the authors' code.
    """
    finite("scale", scale)
    integer_at_least("inner_steps", inner_steps, 1)
    state = chain.start(noise)
    for step in range(chain.num_steps):
        for _ in range(inner_steps):
            state = State(state.x, step, state.solver_state)
            x0 = chain.predict(state)
            with torch.enable_grad():
                clean = x0.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(reward(clean).sum(), clean)
            x, solver_state = take_step(chain, state, x0)
            factor = scale * sample_norms(state.x - x) / sample_norms(gradient).clamp(min=_TINY)
            state = State(x + factor * gradient, step + 1, solver_state)
    return state.x


def take_step(chain: SamplingChain, state: State, x0: Tensor) -> tuple[Tensor, Any]:
    """Take the sampler's step from `state` with a given estimate of the clean latent.

    Returns:
        The next latent `(B, ...)`, and the solver state.
    """
    t, s = chain.grid[state.step]
    transition, solver_state = chain.sampler.step(chain.model.schedule, state.x, x0, t, s, state.solver_state)
    return transition.rsample(), solver_state


def sample_norms(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, `(B, 1, ..., 1)`."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.view(-1, *[1] * (x.dim() - 1))


_TINY = 1e-30  # of a gradient that is zero
