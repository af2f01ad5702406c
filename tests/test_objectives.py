"""Objectives against closed forms and explicit loops."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import APA, PPO, PRDP, Objective, PolicyBatch, Reinforce

STEPS, PROMPTS, GROUP = 3, 2, 3
BATCH = PROMPTS * GROUP


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(objective: Objective, moved: Tensor, **batch: Any) -> Tensor:
    """Return the gradient with respect to log-probabilities that have changed by the given values since the rollout."""
    old = random(STEPS, moved.shape[1], seed=1)
    log_probs = (old + moved).requires_grad_()
    return torch.autograd.grad(objective(PolicyBatch(log_probs, old, **batch)), log_probs)[0]


def test_reinforce_weights_log_probabilities_by_advantages() -> None:
    advantages = random(BATCH)
    slopes = gradient(Reinforce(), random(STEPS, BATCH, seed=2), advantages=advantages)
    torch.testing.assert_close(slopes, (-advantages / (STEPS * BATCH)).expand(STEPS, BATCH))


@pytest.mark.parametrize("form", ["min", "clip_only"])
def test_ppo_gradient_at_ratio_one_equals_reinforce(form: Any) -> None:
    still, advantages = torch.zeros(STEPS, BATCH, dtype=torch.float64), random(BATCH)
    ours = gradient(PPO(form=form), still, advantages=advantages)
    torch.testing.assert_close(ours, gradient(Reinforce(), still, advantages=advantages))
    assert not PPO().clipped(PolicyBatch(still, still, advantages)).any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "minimum", "clip_only"),
    [
        (2.0, 1.05, True, True),
        (2.0, 1.2, False, False),
        (2.0, 0.8, True, False),
        (-2.0, 1.2, True, False),
        (-2.0, 0.8, False, False),
        (-2.0, 0.95, True, True),
    ],
)
def test_ppo_has_no_gradient_beyond_the_clip(advantage: float, ratio: float, minimum: bool, clip_only: bool) -> None:
    """The gradient is `-A rho` if the ratio is not clipped, and 0 otherwise."""
    moved = torch.full((STEPS, 1), ratio, dtype=torch.float64).log()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    for form, learns in (("min", minimum), ("clip_only", clip_only)):
        slopes = gradient(PPO(clip=0.1, form=form), moved, advantages=advantages)
        expected = -advantage * ratio / STEPS if learns else 0.0
        torch.testing.assert_close(slopes, torch.full_like(slopes, expected))
    outside = PPO(clip=0.1).clipped(PolicyBatch(moved, torch.zeros_like(moved), advantages))
    assert bool(outside.all()) == (abs(ratio - 1) > 0.1) == bool(outside.any())


@pytest.mark.parametrize(("ratio", "outside"), [(1.103, True), (1.097, False), (0.903, False), (0.897, True)])
def test_ppo_counts_a_step_as_clipped_by_its_ratio_and_not_its_log_ratio(ratio: float, outside: bool) -> None:
    """`|log 1.103| < 0.1 < |log 0.903|`: the log-ratios are on the other side of the clip than the ratios."""
    moved = torch.full((STEPS, 1), ratio, dtype=torch.float64).log()
    batch = PolicyBatch(moved, torch.zeros_like(moved), torch.ones(1, dtype=torch.float64))
    assert bool(PPO(clip=0.1).clipped(batch).all()) == outside


def test_ppo_clips_advantages() -> None:
    still = torch.zeros(STEPS, 3, dtype=torch.float64)
    advantages = torch.tensor([-9.0, 1.0, 6.0], dtype=torch.float64)
    slopes = gradient(PPO(advantage_clip=5), still, advantages=advantages)
    torch.testing.assert_close(slopes[0] * STEPS * 3, -advantages.clamp(-5, 5))
    slopes = gradient(PPO(advantage_clip=None), still, advantages=advantages)
    torch.testing.assert_close(slopes[0] * STEPS * 3, -advantages)


# PRDP.


def written_out(log_probs: Tensor, old: Tensor, reference: Tensor, rewards: Tensor, beta: float, clip: float) -> Tensor:
    """Compute the loss pair by pair."""
    losses = []
    for start in range(0, BATCH, GROUP):
        for a, b in combinations(range(start, start + GROUP), 2):
            target = (rewards[a] - rewards[b]) / beta
            plain = proximal = -target
            for t in range(STEPS):
                for sign, i in ((1, a), (-1, b)):
                    ratio = log_probs[t, i] - reference[t, i]
                    before = float(old[t, i] - reference[t, i])
                    plain = plain + sign * ratio
                    proximal = proximal + sign * ratio.clamp(before - clip, before + clip)
            losses.append(torch.maximum(plain**2, proximal**2))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("clip", [0.05, 10.0])
def test_prdp_equals_its_formula(clip: float) -> None:
    old, reference, rewards = (random(STEPS, BATCH, seed=i) for i in (1, 2, 3))
    log_probs = (old + random(STEPS, BATCH, scale=0.1, seed=4)).requires_grad_()
    objective = PRDP(beta=0.7, clip=clip)
    ours = objective(PolicyBatch(log_probs, old, rewards[0], GROUP, reference))
    theirs = written_out(log_probs, old, reference, rewards[0], 0.7, clip)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes)
    moved = (log_probs - old).abs() > clip
    assert torch.equal(objective.clipped(PolicyBatch(log_probs, old, rewards[0], GROUP, reference)), moved)


def test_prdp_gradient_at_the_reference_equals_leave_one_out_reinforce() -> None:
    """`-grad L = (4 / beta) RLOO` for two samples per prompt."""
    still, beta = torch.zeros(STEPS, 4, dtype=torch.float64), 0.3
    rewards = random(4)
    pair = rewards.view(2, 2)
    others = (pair - pair.flip(1)).flatten()
    rloo = -STEPS * gradient(Reinforce(), still, advantages=others)  # a sum over steps
    old = random(STEPS, 4, seed=1)
    ours = gradient(PRDP(beta), still, advantages=rewards, group=2, ref_log_probs=old)
    torch.testing.assert_close(-ours, 4 / beta * rloo)


def test_prdp_loss_is_zero_at_the_optimal_distribution() -> None:
    """`p = p_ref exp(r / beta) / Z`, for any `Z` of a prompt."""
    old, rewards, beta = random(STEPS, BATCH), random(BATCH, seed=5), 0.5
    shift = torch.tensor([0.3, -2.0], dtype=torch.float64).repeat_interleave(GROUP)
    log_probs = old + (rewards / beta - shift) / STEPS
    loss = PRDP(beta, clip=10.0)(PolicyBatch(log_probs, old, rewards, GROUP, old))
    assert loss.item() == pytest.approx(0, abs=1e-20)


# Settings.


def test_reductions_differ_by_the_number_of_dimensions() -> None:
    total = random(4)
    assert torch.equal(PPO(reduction="sum").reduce(total, 10), total)
    assert torch.equal(PPO(reduction="mean").reduce(total, 10), total / 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reinforce(reduction="max"), "reduction='max' is not a valid choice; write one of mean, sum"),
        (lambda: PPO(clip=0), "clip=0 must be a positive number"),
        (lambda: PPO(advantage_clip=-1), "advantage_clip=-1 must be a positive number"),
        (lambda: PPO(form="max"), "form='max' is not a valid choice; write one of min, clip_only"),
        (lambda: PRDP(beta=0), "beta=0 must be a positive number"),
        (lambda: PRDP(clip=-1), "clip=-1 must be a positive number"),
    ],
)
def test_invalid_settings_are_rejected(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_apa_regresses_the_log_ratio_on_the_advantage() -> None:
    """Written out, and at the start `2 / strength` times the gradient of REINFORCE."""
    moved, advantages = random(STEPS, BATCH, seed=2), random(BATCH)
    slopes = gradient(APA(strength=4.0), moved, advantages=advantages)
    torch.testing.assert_close(slopes, 2 * (moved - advantages / 4) / (STEPS * BATCH))
    still = torch.zeros_like(moved)
    reinforce = gradient(Reinforce(), still, advantages=advantages)
    torch.testing.assert_close(gradient(APA(strength=4.0), still, advantages=advantages), reinforce / 2)
    with pytest.raises(ConfigurationError, match="strength=0"):
        APA(strength=0)
