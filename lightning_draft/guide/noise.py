"""Optimization of the noise from which an image is sampled."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_draft.arguments import at_least, integer_at_least, positive
from lightning_draft.chain import SamplingChain
from lightning_draft.guide.best_of_n import where_better
from lightning_draft.guide.gradient import sample_norms
from lightning_draft.guide.latent_score import LatentScore
from lightning_draft.methods.policy import stochastic_steps

Prior = Callable[[Tensor], Tensor]
"""Called with noises `(K, B, ...)`; returns a log-density `(B,)`."""


def reno(
    chain: SamplingChain,
    noise: Tensor,
    reward: LatentScore,
    iterations: int = 50,
    lr: float = 5.0,
    regularization: float = 0.01,
    max_norm: float = 0.1,
) -> Tensor:
    """Ascend the reward with respect to the starting noise; return the latents with the best reward, `(B, ...)`.

        maximize over eps:  r(x_0(eps)) + lambda ((d - 1) log |eps| - |eps|^2 / 2)

    The second term is the log-density of the norm of `d` standard Gaussian numbers, which is highest at
    `|eps| = sqrt(d - 1)`. Each sample's gradient is clipped to the norm `max_norm`; the optimizer is SGD with Nesterov
    momentum 0.9. The noise of a stochastic sampler's steps is sampled once and kept. The gradient passes through all
    steps; the method was published for models of one step.

    Args:
        chain: The sampling chain; `recompute=Recompute(steps=True)` limits the memory to that of one step.
        noise: Starting noise, `(B, ...)`.
        reward: The differentiable reward of clean latents.
        iterations: Number of updates, at least 1.
        lr: Learning rate; without momentum an update moves the noise of a sample by at most `lr * max_norm`.
        regularization: `lambda`.
        max_norm: Norm to which each sample's gradient is clipped.

    References:
        Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization",
        arXiv:2406.04312, and the authors' code, whose values are the defaults.
    """
    at_least("regularization", regularization, 0)
    fixed = list(_step_noise(chain, noise))
    noises = noise.detach()[None].clone()
    optimizer = torch.optim.SGD([noises], positive("lr", lr), momentum=0.9, nesterov=True)

    def sample(noises: Tensor) -> Tensor:
        return _sample(chain, noises[0], fixed)

    def prior(noises: Tensor) -> Tensor:
        return regularization * norm_log_density(noises[0])

    return _ascend(sample, reward, prior, noises, optimizer, iterations, max_norm)


def dno(
    chain: SamplingChain,
    noise: Tensor,
    reward: LatentScore,
    iterations: int = 50,
    lr: float = 0.01,
    regularization: float = 1.0,
    max_norm: float = 1.0,
) -> Tensor:
    """Ascend the reward with respect to all noise of the chain; return the latents with the best reward, `(B, ...)`.

        maximize over z = (x_T, z_1, ..., z_K):  r(x_0(z)) + gamma log p(z)

    with `z_i` the noise of the stochastic steps (none for a deterministic sampler) and `log p` of
    `gaussian_log_probability`. Each sample's gradient is clipped to the norm `max_norm`; the optimizer is AdamW.

    Args:
        chain: The sampling chain; `recompute=Recompute(steps=True)` limits the memory to that of one step.
        noise: Starting noise, `(B, ...)`.
        reward: The differentiable reward of clean latents.
        iterations: Number of updates, at least 1.
        lr: Learning rate: an update moves each number of the noise by about `lr`.
        regularization: `gamma`; 0 for none.
        max_norm: Norm to which each sample's gradient is clipped.

    References:
        Tang et al., "Inference-Time Alignment of Diffusion Models with Direct Noise Optimization", arXiv:2405.18881,
        and the authors' code.
    """
    at_least("regularization", regularization, 0)
    noises = torch.stack([noise.detach(), *_step_noise(chain, noise)])
    optimizer = torch.optim.AdamW([noises], positive("lr", lr))

    def sample(noises: Tensor) -> Tensor:
        return _sample(chain, noises[0], list(noises[1:]))

    def prior(noises: Tensor) -> Tensor:
        if regularization == 0:
            return noises.new_zeros(noises.shape[1])
        return regularization * gaussian_log_probability(noises)

    return _ascend(sample, reward, prior, noises, optimizer, iterations, max_norm)


def norm_log_density(noise: Tensor) -> Tensor:
    """Return `(d - 1) log |eps| - |eps|^2 / 2` of noise `(B, ...)`, `(B,)`: the chi density without its constant."""
    squares = noise.flatten(1).square().sum(1)
    return (noise[0].numel() - 1) / 2 * squares.log() - squares / 2


def gaussian_log_probability(noises: Tensor, block: int = 4, permutations: int = 10) -> Tensor:
    """Bound the log-probability that Gaussian noise has a mean and covariance as unusual as `noises`, `(B,)`, <= 0.

    The `D` numbers of a sample are divided into `m = D / k` blocks of `k`. With `M_1` the norm of the mean of the
    blocks and `M_2` the spectral norm of `sum x x^T / m - I`:

        log p_1 = min(0, log 2 - m M_1^2 / (2 k))
        log p_2 = min(0, log 2 - m max(0, sqrt(1 + M_2) - 1 - sqrt(k / m))^2 / 2)

    The result is `log p_1 + log p_2` in the order of the numbers, plus its mean over random permutations of them.

    Args:
        noises: `(K, B, ...)`; all `K` tensors of a sample are one sequence.
        block: `k`.
        permutations: Number of random permutations; the authors use 100.

    References:
        Tang et al., arXiv:2405.18881, section 4 and the authors' code.
    """
    flat = noises.transpose(0, 1).flatten(1)
    orders = torch.stack([torch.randperm(flat.shape[1]) for _ in range(permutations)]).to(flat.device)
    return _block_log_probability(flat, block) + _block_log_probability(flat[:, orders], block).mean(1)


def _block_log_probability(flat: Tensor, block: int) -> Tensor:
    """Return `log p_1 + log p_2` of sequences `(..., D)`, `(...)`."""
    count = flat.shape[-1] // block
    blocks = flat[..., : count * block].reshape(*flat.shape[:-1], count, block)
    mean_square = blocks.mean(-2).square().sum(-1)
    identity = torch.eye(block, dtype=flat.dtype, device=flat.device)
    deviation = torch.linalg.matrix_norm(blocks.mT @ blocks / count - identity, ord=2)
    excess = ((1 + deviation).sqrt() - 1 - math.sqrt(block / count)).clamp(min=0)
    first: Tensor = math.log(2) - count * mean_square / (2 * block)
    second: Tensor = math.log(2) - count * excess.square() / 2
    return first.clamp(max=0) + second.clamp(max=0)


def _ascend(
    sample: Callable[[Tensor], Tensor],
    reward: LatentScore,
    prior: Prior,
    noises: Tensor,
    optimizer: Optimizer,
    iterations: int,
    max_norm: float,
) -> Tensor:
    """Maximize `reward(sample(noises)) + prior(noises)`; return each sample's latents with the highest reward."""
    integer_at_least("iterations", iterations, 1)
    positive("max_norm", max_norm)
    noises.requires_grad_()
    with torch.no_grad():
        best = torch.zeros_like(noises[0])
        scores = noises.new_full((noises.shape[1],), -math.inf)
    for iteration in range(iterations + 1):
        with torch.set_grad_enabled(iteration < iterations):
            latents = sample(noises)
            rewards = reward(latents)
        best = where_better(rewards.detach(), scores, latents.detach(), best)
        scores = torch.fmax(scores, rewards.detach())
        if iteration < iterations:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad((rewards + prior(noises)).sum(), noises)
            noises.grad = -_clip(gradient, max_norm)
            optimizer.step()
    return best


def _clip(gradient: Tensor, max_norm: float) -> Tensor:
    """Return gradients `(K, B, ...)` with the norm of each sample clipped."""
    norms = sample_norms(gradient.transpose(0, 1))
    return gradient * (max_norm / (norms + 1e-6)).clamp(max=1).transpose(0, 1)


def _step_noise(chain: SamplingChain, noise: Tensor) -> Iterator[Tensor]:
    """Yield noise for the stochastic steps, in the order in which the sampler would sample it."""
    for _ in stochastic_steps(chain.sampler, chain.model.schedule):
        yield torch.randn_like(noise)


def _sample(chain: SamplingChain, noise: Tensor, step_noise: list[Tensor]) -> Tensor:
    """Return the clean latents of starting noise and of one tensor of noise for each stochastic step."""
    stochastic = stochastic_steps(chain.sampler, chain.model.schedule)
    by_step = dict(zip(stochastic, step_noise, strict=True))
    state_noise = [by_step.get(step, noise) for step in range(chain.num_steps)]
    return [x for _, x in chain.sample_steps(noise, state_noise)][-1]
