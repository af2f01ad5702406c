"""Best of n: the sample with the highest reward among several."""

import torch
from torch import Tensor

from lightning_draft.arguments import integer_at_least
from lightning_draft.chain import SamplingChain
from lightning_draft.guide.latent_score import LatentScore


@torch.no_grad()
def best_of_n(chain: SamplingChain, noise: Tensor, reward: LatentScore, n: int = 8) -> Tensor:
    """Sample `n` times for each prompt and return the latents with the highest reward, `(B, ...)`.

        x* = x_0(eps_k),  k = argmax_i r(x_0(eps_i)),  eps_1 = noise,  eps_2, ..., eps_n ~ N(0, I)

    The KL divergence of these samples from those of the model is at most `log n - (n - 1) / n`. The reward needs no
    gradient. The cost is `n` times that of sampling.

    Args:
        chain: The sampling chain.
        noise: Starting noise of the first candidates, `(B, ...)`; the noise of the others is sampled.
        reward: The reward of clean latents.
        n: Number of candidates for each prompt, at least 1.

    References:
        Stiennon et al., "Learning to summarize from human feedback", arXiv:2009.01325 (best of n and its divergence).
        Ma et al., "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", arXiv:2501.09732
        (random search over noises).
    """
    integer_at_least("n", n, 1)
    best = chain.advance(chain.start(noise)).x
    scores = reward(best)
    for _ in range(n - 1):
        latents = chain.advance(chain.start(torch.randn_like(noise))).x
        candidates = reward(latents)
        best = where_better(candidates, scores, latents, best)
        scores = torch.maximum(scores, candidates)
    return best


def where_better(new_scores: Tensor, old_scores: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` for the samples whose new score `(B,)` is higher, and `old` for the others, `(B, ...)`."""
    return torch.where((new_scores > old_scores).view(-1, *[1] * (new.dim() - 1)), new, old)
