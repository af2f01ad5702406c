"""The objectives of the forward-process module: values and gradients of a linear model by hand, in float64."""

import inspect

import pytest
import torch
from torch import Tensor

import lightning_draft.forward_objectives as pointwise
import lightning_draft.group_objectives as grouped
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
from lightning_draft.objectives import PPO, PRDP, PolicyBatch, Reinforce
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.schedules import RectifiedFlow, Schedule
from lightning_draft.testing import LinearModel
from tests.tiny_forward_process import (
    BASE,
    GROUP,
    OLD,
    PROMPTS,
    THETA,
    VARIANTS,
    battery,
    in_float64,
    linear,
    moved,
    noised,
)
from tests.tiny_policy_gradients import MILD


def test_list_covers_every_objective() -> None:
    members = [each for module in (pointwise, grouped) for _, each in inspect.getmembers(module, inspect.isclass)]
    shipped = {each for each in members if issubclass(each, ForwardObjective)} - {ForwardObjective}
    assert {type(objective) for objective in VARIANTS} == shipped


def errors(x: Tensor, target: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Return `e = mean (theta x - u)^2` of each sample and `d e / d theta`."""
    difference = (theta * x - target).flatten(1)
    return difference.square().mean(1), 2 * (difference * x.flatten(1)).mean(1)


def by_hand(
    objective: ForwardObjective, x: Tensor, target: Tensor, advantages: Tensor, sigma: float, gain: float
) -> Tensor:
    """Return the loss and its derivative with respect to theta, from the papers' equations.

    An estimate of `x_0` changes by `-gain` times the change of the prediction: `sigma` for a velocity, and
    `sigma / alpha` for the noise.
    """
    (e, de), (old, _), (ref, _) = (errors(x, target, theta) for theta in (THETA, OLD, BASE))
    A, groups = advantages, advantages.view(-1, GROUP)  # noqa: N806
    if isinstance(objective, DiffusionNFT):
        good, total = A.clamp(-1, 1) / 2 + 0.5, torch.zeros(2, dtype=torch.float64)
        for weight, sign in ((good, 1), (1 - good, -1)):
            theta = OLD + sign * objective.beta * (THETA - OLD)
            difference = gain * (target - theta * x).flatten(1)
            scale = weight / difference.abs().mean(1) / objective.beta
            slope = -sign * objective.beta * gain * x.flatten(1)
            total += torch.stack([(scale[:, None] * y).mean() for y in (difference**2, 2 * difference * slope)])
        return total
    if isinstance(objective, AWM) and isinstance(objective.policy, Reinforce):
        return torch.stack([(A * y).mean() * x[0].numel() for y in (e, de)])
    if isinstance(objective, AWM):
        ratio = (sigma * (old - e)).exp()
        outside = torch.where(A > 0, ratio > 1.02, ratio < 0.98)
        value = torch.maximum(-A * ratio, -A * ratio.clamp(0.98, 1.02)).mean()
        return torch.stack([value, torch.where(outside, 0, A * ratio * sigma * de).mean()])
    if isinstance(objective, RWR):
        weight = (A / 0.7).exp().clamp(max=2.0)
        return torch.stack([(weight * y).mean() for y in (e, de)])
    if isinstance(objective, OnlineDPO):
        rows, gains, slopes = torch.arange(len(groups)), (e - ref).view(-1, GROUP), de.view(-1, GROUP)
        best, worst = (rows, groups.argmax(1)), (rows, groups.argmin(1))
        logit = -objective.beta / 2 * (gains[best] - gains[worst])
        slope = (1 - logit.sigmoid()) * objective.beta / 2 * (slopes[best] - slopes[worst])
        return torch.stack([-logit.sigmoid().log().mean(), slope.mean()])
    if isinstance(objective, DGPO):
        other = old if objective.reference == "old" else ref
        limited = A.clamp(-objective.advantage_clip, objective.advantage_clip)
        total = objective.beta / GROUP * (limited * (e - other)).view(-1, GROUP).sum(1)
        if objective.clip is not None:
            ratio = (old - e).exp()
            de = torch.where(torch.where(A > 0, ratio > 1.02, ratio < 0.98), 0, de)
        slope = total.sigmoid() * (limited * de).view(-1, GROUP).mean(1)
        return torch.stack([total.exp().log1p().mean() / objective.beta, slope.mean()])
    assert isinstance(objective, CRD)
    other = old if objective.reference == "old" else ref
    difference = (objective.beta * (other - e) - A).view(-1, GROUP)
    centered, slope = difference - difference.mean(1, keepdim=True), -objective.beta * de.view(-1, GROUP)
    return torch.stack([centered.square().mean(), 2 * (centered * (slope - slope.mean(1, keepdim=True))).mean()])


@battery
@pytest.mark.parametrize("schedule", [RectifiedFlow(3.0), MILD], ids=["flow", "epsilon"])
def test_loss_and_gradient_equal_the_paper_s_equations(objective: ForwardObjective, schedule: Schedule) -> None:
    """For a model that differs from the old policy, averaged over all times of two prompts with three samples."""
    flow = isinstance(schedule, RectifiedFlow)
    model = LinearModel(BASE, "flow" if flow else "epsilon", schedule, (3, 2, 2))
    module = linear(model=model, sampler=FlowEuler(4) if flow else DDIM(3), objective=objective)
    rollout = moved(module)
    (minibatch,) = module.minibatches(2)
    loss, logs = module.loss_and_logs(PROMPTS, rollout, minibatch)
    expected = torch.zeros(2, dtype=torch.float64)
    times = module.training_times(0, 0)
    for index, t in enumerate(times):
        x, target = noised(module, rollout, index, t)
        alpha, sigma = schedule.coefficients(t)
        gain = sigma if flow else sigma / alpha
        expected += by_hand(objective, x, target, rollout.advantages, sigma, gain) / len(times)
    found = torch.stack([loss.detach(), torch.autograd.grad(loss, model.theta)[0]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert logs["train/loss"].item() == loss.item()


def test_kl_term_equals_the_squared_distance_from_the_base_prediction() -> None:
    """For a linear model `mean (theta - theta_base)^2 x_t^2`."""
    module = linear(objective=RWR(), kl_weight=0.5)
    rollout = moved(module)
    (minibatch,) = module.minibatches(2)
    loss, logs = module.loss_and_logs(PROMPTS, rollout, minibatch)
    points = [noised(module, rollout, index, t)[0] for index, t in enumerate(module.training_times(0, 0))]
    expected = (THETA - BASE) ** 2 * torch.stack(points).square().mean()
    assert logs["train/kl"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss.item() == logs["train/loss"].item()
    assert loss.item() == pytest.approx((logs["train/denoising_loss"] + 0.5 * logs["train/kl"]).item())


def test_on_policy_nft_gradient_equals_the_advantage_weighted_denoising_gradient() -> None:
    """For any `beta` and clip, with and without a network call of the old policy."""
    found = []
    for beta, clip in ((0.1, 5.0), (1.0, 5.0), (2.0, 9.0)):
        for saved in (True, False):
            module = linear(objective=DiffusionNFT(beta, clip))
            rollout = in_float64(module.collect_rollout(PROMPTS))
            (minibatch,) = module.minibatches(2)
            loss, _ = module.loss_and_logs(PROMPTS, rollout, minibatch, moved=not saved)
            found.append(torch.autograd.grad(loss, module.model.theta)[0])
    expected = []
    for index, t in enumerate(module.training_times(0, 0)):
        x, target = noised(module, rollout, index, t)
        difference = t * (BASE * x - target).flatten(1)
        weight = rollout.advantages / difference.abs().mean(1)
        expected.append((weight * 2 * t * (difference * x.flatten(1)).mean(1)).mean())
    for gradient in found:
        torch.testing.assert_close(gradient, torch.stack(expected).mean(), rtol=1e-9, atol=0)


def test_awm_has_the_same_on_policy_gradient_with_ppo_and_reinforce() -> None:
    gradients = []
    for policy in (PPO(advantage_clip=None), Reinforce()):
        module = linear(objective=AWM(policy))
        rollout = in_float64(module.collect_rollout(PROMPTS))
        loss, _ = module.loss_and_logs(PROMPTS, rollout, module.minibatches(2)[0], moved=False)
        gradients.append(torch.autograd.grad(loss, module.model.theta)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)


def test_crd_equals_prdp_with_the_negative_denoising_error_as_log_probability() -> None:
    """The mean of squared differences over pairs is `2 G / (G - 1)` times the variance; PRDP divides by `beta`."""
    module = linear(objective=CRD(0.8))
    rollout = moved(module)
    module.num_times = 1
    loss, _ = module.loss_and_logs(PROMPTS, rollout, module.minibatches(2)[0])
    x, target = noised(module, rollout, 0, module.training_times(0, 0)[0])
    now, old = (-errors(x, target, theta)[0][None] for theta in (THETA, OLD))
    pairs = PRDP(beta=0.8, clip=1e9)(PolicyBatch(now, old, rollout.advantages, GROUP, old))
    assert loss.item() == pytest.approx((0.8**2 * (GROUP - 1) / (2 * GROUP) * pairs).item(), rel=1e-9)


def test_online_dpo_trains_on_the_best_and_the_worst_sample() -> None:
    chosen = OnlineDPO().select(torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -3.0]]))
    assert chosen.tolist() == [[0, 1], [1, 2]]
