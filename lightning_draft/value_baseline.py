"""A learned value function of the latents as the baseline of policy gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.arguments import in_range, integer_at_least, positive
from lightning_draft.distributed import all_gather_objects
from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import Objective

Statistics = Mapping[int, tuple[Tensor, Tensor]]
"""The matrix `sum phi phi^T` and the vector `sum phi A` of each step."""


class ValueBaseline:
    """Subtract from the advantage of each step what the latent before the step predicts of it.

        A_{t,i} = A_i - V_t(x_{t,i}),  V_t(x) = w_t . phi(x),  w_t = argmin_w sum (w . phi - A)^2 + ridge |w|^2

    with the features `phi(x)`: the latent, averaged in `pool x pool` cells, and 1. The sum is over the samples of all
    earlier rollouts, those of `n` rollouts ago with the weight `decay^(n - 1)`. Because `V_t` depends on nothing that
    happens in the step or later, the expectation of the gradient does not change, and its variance decreases if the
    latent predicts the reward, as it does late in the chain.

    Args:
        pool: Number of cells in each direction, at least 1.
        ridge: Strength of the regularization, positive; in units of samples, because features are of order 1.
        decay: Factor of the weight of earlier rollouts, in [0, 1].

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Fan and Lee, "Optimizing DDPM Sampling with Shortcut Fine-Tuning", arXiv:2301.13362 (SFT-PG), where the value
        function is a network.
    """

    def __init__(self, pool: int = 2, ridge: float = 1.0, decay: float = 0.9) -> None:
        self.pool = integer_at_least("value_baseline.pool", pool, 1)
        self.ridge = positive("value_baseline.ridge", ridge)
        self.decay = in_range("value_baseline.decay", decay, 0, 1)
        self.statistics: Statistics = {}

    def check(self, objective: Objective) -> None:
        """Check that an objective can use an advantage for each step.

        Raises:
            ConfigurationError: It compares whole samples.
        """
        if not objective.separable:
            raise ConfigurationError(
                f"value_baseline gives each step its own advantage, and {type(objective).__name__} needs one per "
                "sample; use PPO or Reinforce, or set value_baseline to null"
            )

    def step_advantages(self, latents: Tensor, advantages: Tensor, steps: Sequence[int]) -> tuple[Tensor, float]:
        """Subtract the values from the advantages of a rollout, then add the rollouts of all processes.

        Args:
            latents: The latents before the steps, `(S, N, ...)`.
            advantages: Those of the samples, `(N,)`.
            steps: The stochastic steps.

        Returns:
            The advantages of the steps, `(S, N)`, and the fraction of the mean square that was subtracted.
        """
        features = self.features(latents)
        remaining = advantages - self.values(features, steps).to(advantages)
        gathered = all_gather_objects((features, advantages.cpu()))
        self.update(torch.cat([each for each, _ in gathered], 1), torch.cat([each for _, each in gathered]), steps)
        return remaining, 1 - float(remaining.square().mean() / advantages.square().mean().clamp(min=1e-12))

    def features(self, latents: Tensor) -> Tensor:
        """Return the features of latents `(S, N, ...)`, `(S, N, F)`, float64 on the CPU."""
        values = latents.flatten(0, 1).double().cpu()
        if values.dim() == 4:
            values = F.adaptive_avg_pool2d(values, self.pool)
        values = torch.cat([values.flatten(1), torch.ones(len(values), 1, dtype=torch.float64)], 1)
        return values.view(*latents.shape[:2], -1)

    def values(self, features: Tensor, steps: Sequence[int]) -> Tensor:
        """Return `V_t` of features `(S, N, F)` of some steps, `(S, N)`; 0 before the first update."""
        found = []
        for step, phi in zip(steps, features, strict=True):
            gram, moment = self.statistics.get(step, (torch.zeros(1, 1).double(), torch.zeros(1).double()))
            known = len(moment) == phi.shape[1]
            weights = torch.linalg.solve(gram + self.ridge * torch.eye(len(gram)).double(), moment)
            found.append(phi @ weights if known else phi.new_zeros(len(phi)))
        return torch.stack(found)

    def update(self, features: Tensor, advantages: Tensor, steps: Sequence[int]) -> None:
        """Add a rollout, with advantages `(N,)`, to the statistics, which are replaced and not changed in place."""
        fresh = {}
        for step, phi in zip(steps, features, strict=True):
            gram, moment = self.statistics.get(step, (0.0, 0.0))
            fresh[step] = self.decay * gram + phi.T @ phi, self.decay * moment + phi.T @ advantages.to(phi)
        self.statistics = {**self.statistics, **fresh}

    @staticmethod
    def state_dict(statistics: Statistics) -> dict[str, Any]:
        """Return statistics as types that can be loaded with `weights_only=True`."""
        return {str(step): list(pair) for step, pair in statistics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore statistics; the state of a run without a baseline is empty."""
        self.statistics = {int(step): (pair[0], pair[1]) for step, pair in state.items()}
