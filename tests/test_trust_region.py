"""Objectives that limit the change of each step, against formulas of the Gaussian means and explicit loops."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import lightning_draft.trust_region as module_of_objectives
from lightning_draft.errors import ConfigurationError
from lightning_draft.forward_objectives import AWM
from lightning_draft.objectives import MeanChange, Objective, PolicyBatch, Reinforce
from lightning_draft.samplers import FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel
from lightning_draft.trust_region import FlowDPPO, GRPOGuard, SampleDropout
from lightning_draft.windows import SlidingWindow
from tests.tiny_policy_gradients import fit, linear, trainer_of
from tests.tiny_runs import PROMPTS, data

VARIANTS: list[Objective] = [GRPOGuard(clip=0.05), FlowDPPO(max_kl=1e-4), SampleDropout(max_change=1e-2)]
battery = pytest.mark.parametrize("objective", VARIANTS, ids=lambda objective: type(objective).__name__)
STEPS, BATCH, SHAPE = 3, 4, (2, 5)
STDS, LENGTHS = (0.8, 0.4, 0.3), (0.5, 0.2, 0.1)


def test_the_parametrized_tests_cover_every_objective() -> None:
    members = [member for _, member in inspect.getmembers(module_of_objectives, inspect.isclass)]
    shipped = {each for each in members if each.__module__ == module_of_objectives.__name__}
    assert {type(objective) for objective in VARIANTS} == shipped


def gaussians(reduction: str = "mean", size: float = 0.1) -> tuple[PolicyBatch, Tensor, Tensor, Tensor]:
    """Return a batch of Gaussian steps, the noise `z`, and the new and the old means."""
    generator = torch.Generator().manual_seed(1)
    old, moved, z = torch.randn(3, STEPS, BATCH, *SHAPE, dtype=torch.float64, generator=generator)
    new, std = (old + size * moved).requires_grad_(), torch.tensor(STDS, dtype=torch.float64).view(-1, 1, 1, 1)
    x = old + std * z

    def reduce(values: Tensor) -> Tensor:
        return values.flatten(2).mean(2) if reduction == "mean" else values.flatten(2).sum(2)

    before, after = Normal(old, std), Normal(new, std)
    stds, lengths = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (STDS, LENGTHS))
    change = MeanChange(reduce(kl_divergence(before, after)), stds, lengths)
    advantages = torch.tensor([1.5, -0.5, -9.0, 0.7], dtype=torch.float64)
    return PolicyBatch(reduce(after.log_prob(x)), reduce(before.log_prob(x)), advantages, change=change), z, new, old


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [0.01, 3.0])
def test_log_ratio_of_grpo_guard_is_the_product_of_noise_and_change(reduction: Any, size: float) -> None:
    batch, z, new, old = gaussians(reduction, size)
    products = (z * (new - old)).flatten(2)
    expected = products.mean(2) if reduction == "mean" else products.sum(2)
    torch.testing.assert_close(GRPOGuard(reduction=reduction).log_ratio(batch), expected, rtol=1e-9, atol=1e-12)


def test_grpo_guard_equals_its_formula_step_by_step() -> None:
    batch, z, new, old = gaussians(size=0.5)
    losses, outside = [], []
    for step in range(STEPS):
        for i, advantage in enumerate((1.5, -0.5, -5.0, 0.7)):
            ratio = (z[step, i] * (new[step, i] - old[step, i])).mean().exp()
            losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.95, 1.05)) / LENGTHS[step])
            outside.append(bool((ratio - 1).abs() > 0.05))
    expected, objective = torch.stack(losses).mean(), GRPOGuard(clip=0.05)
    torch.testing.assert_close(objective(batch), expected)
    found, theirs = (torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (objective(batch), expected))
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12)
    assert objective.clipped(batch).flatten().tolist() == outside
    assert len(set(outside)) == 2


@pytest.mark.parametrize(
    ("advantage", "ratio", "kl", "learns"),
    [
        (2.0, 1.2, 1e-3, True),
        (2.0, 1.2, 1e-1, False),
        (2.0, 0.8, 1e-1, True),
        (-2.0, 1.2, 1e-1, True),
        (-2.0, 0.8, 1e-1, False),
        (-2.0, 0.8, 1e-3, True),
    ],
)
def test_flow_dppo_masks_steps_that_moved_far_in_the_direction_of_their_advantage(
    advantage: float, ratio: float, kl: float, learns: bool
) -> None:
    log_probs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    one, old = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    batch = PolicyBatch(log_probs, old, torch.tensor([advantage]).double(), change=MeanChange(kl * one, one, one))
    objective = FlowDPPO(max_kl=1e-2)
    (slope,) = torch.autograd.grad(objective(batch), log_probs)
    assert slope.item() == pytest.approx(-advantage * ratio if learns else 0)
    assert bool(objective.clipped(batch)) != learns


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "learns"), [(1.09, True), (1.11, False), (0.91, True), (0.89, False)])
def test_sample_dropout_drops_steps_by_the_ratio_alone(advantage: float, ratio: float, learns: bool) -> None:
    log_probs = torch.tensor([[ratio, 1.0]], dtype=torch.float64).log().requires_grad_()
    batch = PolicyBatch(log_probs, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([advantage, 1.0]).double())
    objective = SampleDropout(max_change=0.1)
    (slope,) = torch.autograd.grad(objective(batch), log_probs)
    assert slope[0].tolist() == pytest.approx([-advantage * ratio / 2 if learns else 0, -0.5])
    assert objective.clipped(batch).tolist() == [[not learns, False]]


@pytest.mark.parametrize("objective", [FlowDPPO(), SampleDropout()], ids=lambda objective: type(objective).__name__)
def test_gradient_at_the_rollout_equals_reinforce(objective: Objective) -> None:
    slopes = []
    for each in (objective, Reinforce()):
        module = linear(objective=each)
        loss, _ = module.loss_and_logs(PROMPTS[:2], module.collect_rollout(PROMPTS[:2]), *module.minibatches(2))
        slopes.append(torch.autograd.grad(loss, module.model.theta)[0])
    torch.testing.assert_close(*slopes)


@battery
@pytest.mark.parametrize("window", [None, SlidingWindow(2, rollouts=1)], ids=["all steps", "window"])
def test_module_computes_the_change_from_the_means_of_the_rollout(objective: Objective, window: Any) -> None:
    """Against the sampler's steps written out, for a flow on which the length of a step is `t - s`."""
    model = LinearModel(0.1, "flow", RectifiedFlow(), (3, 2, 2))
    module = linear(model=model, sampler=FlowSDE(5), objective=objective, window=window)
    rollout = module.collect_rollout(PROMPTS[:2], 1)
    model.theta.data += 0.05
    steps = module.policy_of(1).steps
    found: list[list[Tensor]] = [[], [], []]
    for index, step in enumerate(steps):
        t, s = module.sampler.grid(model.schedule)[step]
        x, std = rollout.latents[step], module.sampler.diffusion(t, s) * (t - s) ** 0.5
        means = [module.sampler.step(model.schedule, x, x - t * v * x, t, s)[0].mean for v in (0.1, model.theta)]
        if rollout.old_means is not None:
            torch.testing.assert_close(rollout.old_means[index], means[0], rtol=1e-4, atol=1e-5)
        found[0].append(((means[1] - means[0]) ** 2).flatten(1).mean(1) / (2 * std**2))
        for values, mean in zip(found[1:], means, strict=True):
            values.append(Normal(mean, std).log_prob(rollout.latents[step + 1]).flatten(1).mean(1))
    kl, old, now = map(torch.stack, found)
    grid = module.sampler.grid(model.schedule)
    stds = torch.tensor([[module.sampler.diffusion(*grid[i]) * (grid[i][0] - grid[i][1]) ** 0.5] for i in steps])
    change = MeanChange(kl, stds, torch.tensor([[grid[i][0] - grid[i][1]] for i in steps]))
    expected = objective(PolicyBatch(now, old, rollout.advantages, 2, change=change))
    loss, logs = module.loss_and_logs(PROMPTS[:2], rollout, *module.minibatches(2))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    ours, theirs = (torch.autograd.grad(each, model.theta)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert ("train/old_kl" in logs) == objective.needs_old_means == (rollout.old_means is not None)
    if objective.needs_old_means:
        assert logs["train/old_kl"].item() == pytest.approx(kl.mean().item(), rel=1e-3)


@battery
def test_minibatch_gradients_add_up_to_that_of_the_rollout(objective: Objective, tmp_path: Path) -> None:
    found = []
    for accumulate, options in ((1, {}), (6, {"micro_batch_size": 3, "timesteps_per_minibatch": 1})):
        module = linear(objective=objective, inner_epochs=2, **options)
        recorder = fit(tmp_path, module, steps=2, accumulate_grad_batches=accumulate)
        found.append((recorder.gradients[-1], recorder.steps[-1]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=0)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-7)


@battery
def test_resumed_run_equals_uninterrupted_run(objective: Objective, tmp_path: Path) -> None:
    """Saved within a rollout, whose old means are needed in the next step."""

    def run(ckpt: str | None = None) -> float:
        module = linear(objective=objective, inner_epochs=3)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = trainer_of(tmp_path, saving, max_steps=4, enable_checkpointing=True)
        trainer.fit(module, data(), ckpt_path=ckpt)
        return module.model.theta.item()

    straight = run()
    kept = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["rollouts"][0]["rollout"]
    assert (kept["old_means"] is not None) == objective.needs_old_means
    assert run(str(tmp_path / "step=2.ckpt")) == straight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPOGuard(clip=0.0), "clip=0.0 must be a positive number"),
        (lambda: FlowDPPO(max_kl=0.0), "max_kl=0.0 must be a positive number"),
        (lambda: SampleDropout(max_change=-1.0), "max_change=-1.0 must be a positive number"),
        (lambda: AWM(GRPOGuard()), "policy=GRPOGuard must be an objective of single steps"),
    ],
)
def test_invalid_settings_are_configuration_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
