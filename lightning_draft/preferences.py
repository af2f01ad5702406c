"""Advantages from preferences between the samples of a prompt.

A preference `w_ij` in [0, 1] is the probability that sample `i` is better than sample `j`, with `w_ji = 1 - w_ij`. It
comes from a `PairwiseReward`, such as a vision-language judge or human votes, or from comparing the scores of any other
reward: 1, 0, or 0.5 for equal scores.

References:
    Wang et al., "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
        arXiv:2508.20751, and the authors' code.
    Bradley and Terry, "Rank Analysis of Incomplete Block Designs: The Method of Paired Comparisons", 1952.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_draft.advantages import AdvantageEstimator, GroupRelative
from lightning_draft.arguments import boolean, positive

_ITERATIONS = 200
_LARGEST_STEP = 2.0


class PreferenceAdvantages(AdvantageEstimator):
    """Compute advantages from preferences between the samples of a prompt."""

    min_group = 2

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group: int) -> Tensor:
        """Compare the rewards of each prompt's samples."""
        return self.from_preferences(compare_scores(rewards, group)).to(rewards)

    @abstractmethod
    def from_preferences(self, preferences: Tensor) -> Tensor:
        """Return advantages `(P * K,)` from preferences `(P, K, K)` of `K` samples for each of `P` prompts."""


class WinRate(PreferenceAdvantages):
    """Pref-GRPO: `A_i = (w_i - mean(w)) / (std(w) + epsilon)` with the win rate `w_i = 1 / (K - 1) sum_{j != i} w_ij`.

    Advantages depend only on the order of the scores: every difference counts the same, and outliers have no larger
    weight.

    Args:
        divide_by_std: Divide by the (population) standard deviation of the prompt's win rates; the authors' code uses
            the unbiased one, which differs by the factor `sqrt((K - 1) / K)`.
        epsilon: Positive; avoids a division by 0 in groups of equal win rates.
    """

    def __init__(self, divide_by_std: bool = True, epsilon: float = 1e-4) -> None:
        self.divide_by_std = boolean("divide_by_std", divide_by_std)
        self.epsilon = positive("epsilon", epsilon)

    def from_preferences(self, preferences: Tensor) -> Tensor:
        """Standardize the win rates of each prompt."""
        rates = win_rates(preferences)
        return GroupRelative(self.divide_by_std, self.epsilon)(rates.flatten(), (), rates.shape[1])


class BradleyTerry(PreferenceAdvantages):
    """Scores `s` for which `sigmoid(s_i - s_j)` fits the preferences best: `A_i = s_i`, with mean 0 for each prompt.

    With `PRDP` as the objective, log-ratios are regressed on differences of these scores, the log-odds of the
    preferences.

    Args:
        prior_std: Standard deviation of the Gaussian prior of the scores, positive. It bounds the scores of samples
            that win all their comparisons.
    """

    def __init__(self, prior_std: float = 1.0) -> None:
        self.prior_std = positive("prior_std", prior_std)

    def from_preferences(self, preferences: Tensor) -> Tensor:
        """Fit the scores of each prompt."""
        return bradley_terry(preferences, self.prior_std).flatten()


def compare_scores(scores: Tensor, group: int) -> Tensor:
    """Return the preferences `(P, group, group)` of scores `(P * group,)`: 1, 0, or 0.5 for equal scores."""
    groups = scores.view(-1, group)
    mine, theirs = groups[:, :, None], groups[:, None, :]
    return ((mine > theirs).double() + (mine >= theirs).double()) / 2


def win_rates(preferences: Tensor) -> Tensor:
    """Return `1 / (K - 1) sum_{j != i} w_ij` for preferences `(P, K, K)`, `(P, K)`."""
    count = preferences.shape[-1]
    others = preferences.masked_fill(torch.eye(count, dtype=torch.bool, device=preferences.device), 0.0)
    return others.sum(-1) / (count - 1)


def bradley_terry(wins: Tensor, prior_std: float) -> Tensor:
    """Return the scores that maximize the posterior probability of comparisons.

    `L(s) = sum_{i != j} w_ij log sigmoid(s_i - s_j) - sum_i s_i^2 / (2 prior_std^2)`

    `L` is concave and has one maximum, whose mean is 0; it is found with Newton's method in float64.

    Args:
        wins: `(P, K, K)`, at least 0: how often `i` won against `j`; pairs without comparisons are 0. The diagonal is
            ignored.
        prior_std: Standard deviation of the prior.

    Returns:
        `(P, K)`, float64.
    """
    identity = torch.eye(wins.shape[-1], dtype=torch.float64, device=wins.device)
    wins = wins.double().masked_fill(identity.bool(), 0.0)
    compared = wins + wins.mT
    # Every matrix entry is increased by 1, which does not change steps with mean 0 and bounds the condition number.
    precision = identity / prior_std**2 + 1
    scores = wins.new_zeros(wins.shape[:-1])
    for _ in range(_ITERATIONS):
        probability = (scores[:, :, None] - scores[:, None, :]).sigmoid()
        gradient = (wins - compared * probability).sum(-1) - scores / prior_std**2
        weight = compared * probability * (1 - probability)
        curvature = torch.diag_embed(weight.sum(-1)) - weight + precision
        step = torch.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        longest = step.abs().amax(1, keepdim=True)
        scores = scores + step * (_LARGEST_STEP / longest.clamp(min=_LARGEST_STEP))
        if float(longest.amax()) < 1e-12:
            break
    return scores
