"""The gradient of policy-gradient methods: its expectation, formulas, minibatches and accumulation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_draft.advantages import LeaveOneOut
from lightning_draft.chain import SamplingChain
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.rollout import Rollout
from lightning_draft.models import Guidance
from lightning_draft.objectives import PPO, PRDP, Objective, PolicyBatch, Reinforce
from lightning_draft.plan import Tracker
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel
from tests.tiny_policy_gradients import MILD, fit, linear, make, stir
from tests.tiny_runs import PROMPTS, data


class Channels(LinearModel):
    """A parameter for each channel."""

    def __init__(self) -> None:
        super().__init__(0.1, schedule=MILD, shape=(3, 1, 1))
        self.theta = nn.Parameter(torch.tensor([0.1, -0.1, 0.3]).view(3, 1, 1))


def test_score_function_and_pathwise_gradients_agree_in_expectation() -> None:
    """`E[A sum_t grad log p]` and `E[grad r]`, each from 300,000 trajectories of a chain with noise at every step."""
    samples, target = 300_000, torch.tensor([1.0, -0.5, 0.3])

    def reward(images: Tensor) -> Tensor:
        return -(images.flatten(1) - target).square().sum(1)

    module = linear(model=Channels(), sampler=DDIM(3, eta=1.0), objective=Reinforce("sum"), samples_per_prompt=samples)
    torch.manual_seed(0)
    chain = SamplingChain(module.model, module.sampler, module.model.encode([""]))
    noise = torch.randn(4, samples, 3, 1, 1)
    pathwise = torch.autograd.grad(reward(chain.advance(chain.start(noise[0])).x).mean(), module.model.theta)[0]

    with torch.no_grad():
        walk = list(chain.sample_steps(noise[0], noise[1:]))
    latents = torch.stack([noise[0], *(x for _, x in walk)])
    log_probs = torch.stack([transition.log_prob(x) for transition, x in walk])
    rewards = reward(latents[-1])
    advantages = LeaveOneOut()(rewards, [""] * samples, samples)
    rollout = Rollout(0, 0, [""] * samples, latents, log_probs, rewards, advantages, {})
    (minibatch,) = module.minibatches(1)
    loss, _ = module.loss_and_logs([""], rollout, minibatch)
    score = -3 * torch.autograd.grad(loss, module.model.theta)[0]  # the loss is a mean over 3 steps
    assert torch.cosine_similarity(score.flatten(), pathwise.flatten(), dim=0) > 0.999
    torch.testing.assert_close(score, pathwise, rtol=0.03, atol=0.03 * pathwise.norm().item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16 base"])
def test_first_step_of_ppo_equals_reinforce(tiny_sd: Path, tmp_path: Path, precision: str) -> None:
    """The ratio is exactly 1 and no step is clipped, with micro-batches and with guidance."""
    found = []
    for objective in (PPO(clip=1e-4), Reinforce()):
        model = {"guidance": Guidance(2.0), "dtype": "bfloat16" if precision == "bf16 base" else "float32"}
        module = stir(make(tiny_sd, model=model, objective=objective, micro_batch_size=2, timesteps_per_minibatch=1))
        mixed = "32-true" if precision == "32-true" else "bf16-mixed"
        found.append(fit(tmp_path, module, precision=mixed, accumulate_grad_batches=6))
    (ppo,), (reinforce,) = (recorder.steps for recorder in found)
    assert (ppo["train/ratio"], ppo["train/clip_fraction"], ppo["train/approx_kl"]) == (1, 0, 0)
    assert ppo["train/advantage_std"] > 0
    torch.testing.assert_close(found[0].gradients[0], found[1].gradients[0], rtol=1e-5, atol=1e-9)
    assert reinforce["train/reward"] == ppo["train/reward"]


def test_ratios_differ_from_one_after_an_update(tmp_path: Path) -> None:
    recorder = fit(tmp_path, linear(objective=PPO(clip=1e-3), inner_epochs=3), steps=4)
    ratios, clipped = recorder.of("train/ratio"), recorder.of("train/clip_fraction")
    assert (ratios[0], clipped[0]) == (1, 0)
    assert ratios[1] != 1
    assert 0 < clipped[2] <= 1
    assert (ratios[3], clipped[3]) == (1, 0)  # a new rollout


def test_logged_ratios_equal_their_formulas() -> None:
    module = linear(objective=PPO(clip=1e-2))
    rollout = module.collect_rollout(PROMPTS[:2])
    module.model.theta.data += 0.02
    (minibatch,) = module.minibatches(2)
    _, logs = module.loss_and_logs(PROMPTS[:2], rollout, minibatch)
    moved = (module.policy.log_probs(rollout.prompts, rollout.latents) - rollout.log_probs).double()
    ratio = moved.exp()
    assert logs["train/ratio"].item() == pytest.approx(ratio.mean().item())
    assert logs["train/approx_kl"].item() == pytest.approx((ratio - 1 - moved).mean().item(), rel=1e-3)
    assert logs["train/clip_fraction"].item() == pytest.approx(((ratio - 1).abs() > 1e-2).double().mean().item())
    assert 0 < logs["train/clip_fraction"] < 1


def test_kl_divergence_equals_that_of_gaussians() -> None:
    """For a linear model it is the squared distance of the means over twice the variance, averaged over dimensions.

    It is proportional to the squared distance of the parameters, and its gradient to the distance.
    """
    module = linear(kl_weight=0.5)
    module.model.theta.data += 0.05
    rollout = module.collect_rollout(PROMPTS[:2])
    (minibatch,) = module.minibatches(2)
    loss, logs = module.loss_and_logs(PROMPTS[:2], rollout, minibatch)
    expected = []
    for step in module.policy.steps:
        t, s = module.sampler.grid(module.model.schedule)[step]
        alpha, sigma = module.model.schedule.coefficients(t)
        x = rollout.latents[step].double()
        ours, base = (
            module.sampler.step(module.model.schedule, x, (x - sigma * theta * x) / alpha, t, s)[0]
            for theta in (0.15, 0.1)
        )
        expected.append(((ours.mean - base.mean) ** 2).mean() / (2 * ours.std**2))
    assert logs["train/kl"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-3)
    assert loss.item() == pytest.approx((logs["train/policy_loss"] + 0.5 * logs["train/kl"]).item())
    assert logs["train/loss"].item() == pytest.approx(loss.item())
    slope = torch.autograd.grad(loss, module.model.theta)[0]
    module.regularizer.weight = 0.0
    loss, plain = module.loss_and_logs(PROMPTS[:2], rollout, minibatch)
    assert plain["train/loss"] == logs["train/policy_loss"]
    assert not {"train/policy_loss", "train/kl"} & plain.keys()
    slope -= torch.autograd.grad(loss, module.model.theta)[0]
    assert slope.item() == pytest.approx(0.5 * 2 * logs["train/kl"].item() / 0.05, rel=1e-3)


def test_kl_per_time_multiplies_each_step_s_divergence_by_its_length() -> None:
    """Then it is the squared distance of the means over `2 sigma_t^2`, as Flow-GRPO's code has it."""
    model = LinearModel(0.1, "flow", RectifiedFlow(), (3, 2, 2))
    module = linear(model=model, sampler=FlowSDE(4), kl_weight=0.5, kl_per_time=True)
    rollout = module.collect_rollout(PROMPTS[:2])
    model.theta.data += 0.05
    _, logs = module.loss_and_logs(PROMPTS[:2], rollout, module.minibatches(2)[0])
    expected = []
    for step in module.policy.steps:
        t, s = module.sampler.grid(model.schedule)[step]
        x, sigma = rollout.latents[step].double(), 0.7 * math.sqrt(t / (1 - (s if t >= 1 else t)))
        ours, base = (module.sampler.step(model.schedule, x, x - t * v * x, t, s)[0].mean for v in (0.15, 0.1))
        expected.append(((ours - base) ** 2).mean() / (2 * sigma**2))
    assert logs["train/kl"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


@pytest.mark.parametrize("objective", [Reinforce(), PPO(), PRDP(beta=0.1)], ids=lambda o: type(o).__name__)
def test_minibatch_gradients_add_up_to_that_of_the_rollout(tmp_path: Path, objective: Objective) -> None:
    """Also for uneven minibatches: 4 samples by 3, 4 steps by 3. Logged values add up too."""

    def outcome(accumulate: int, **options: Any) -> tuple[Tensor, dict[str, float]]:
        module = linear(objective=objective, sampler=DDIM(5, eta=1.0), kl_weight=0.1, **options)
        module.model.theta.data += 0.05
        recorder = fit(tmp_path, module, accumulate_grad_batches=accumulate)
        return recorder.gradients[0], recorder.steps[0]

    gradient, logged = outcome(1)
    assert {"train/loss", "train/policy_loss", "train/kl", "train/ratio"} < logged.keys()
    for cut in (
        outcome(4, micro_batch_size=3, timesteps_per_minibatch=3),
        outcome(16, micro_batch_size=1, timesteps_per_minibatch=1),
    ):
        torch.testing.assert_close(cut[0], gradient, rtol=1e-4, atol=0)
        assert cut[1] == pytest.approx(logged, rel=1e-4, abs=1e-7)


def test_default_stores_the_activations_of_one_step_with_the_same_gradient(tiny_sd: Path) -> None:
    """Six steps at once need little more memory than one."""

    def measured(steps: int, checkpointing: Checkpointing) -> tuple[int, list[Tensor]]:
        sampler = DDIM(steps, eta=1.0, spacing="trailing")
        module = stir(make(tiny_sd, sampler=sampler, checkpointing=checkpointing))
        rollout = module.collect_rollout(PROMPTS)
        (minibatch,) = module.minibatches(len(PROMPTS))
        with Tracker() as live:
            loss, _ = module.loss_and_logs(PROMPTS, rollout, minibatch)
            gradients = torch.autograd.grad(loss, list(module.trainable_parameters().values()))
        return live.peak, list(gradients)

    peak, gradients = measured(6, "auto")
    stored, expected = measured(6, "none")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))
    assert peak < 0.3 * stored
    assert peak < 1.3 * measured(1, "none")[0]


@pytest.mark.parametrize(("steps", "recomputed"), [(None, True), (2, True), (1, False), (9, True)])
def test_steps_are_recomputed_if_a_minibatch_has_several(steps: int | None, recomputed: bool) -> None:
    assert linear(timesteps_per_minibatch=steps).recompute == Recompute(steps=recomputed)
    assert linear(timesteps_per_minibatch=steps, checkpointing="block").recompute == Recompute(blocks=True)
    assert not linear(sampler=DDIM(1, eta=1.0), timesteps_per_minibatch=steps).recompute.steps


@pytest.mark.parametrize("objective", [Reinforce(), PRDP(beta=0.1)], ids=lambda o: type(o).__name__)
def test_optimizer_step_over_several_rollouts_uses_their_mean_gradient(tmp_path: Path, objective: Objective) -> None:
    """Three rollouts with three minibatches each, although two rollouts contain every prompt."""
    modules = [linear(objective=objective, timesteps_per_minibatch=1) for _ in range(2)]
    for module in modules:
        module.model.theta.data += 0.05
    (ours,) = fit(tmp_path, modules[0], accumulate_grad_batches=9).gradients
    fresh, loader, slopes = modules[1], data().train_dataloader(), []
    for number in range(3):
        rollout = fresh.collect_rollout(loader.batch(number), number)
        log_probs = fresh.policy.evaluate(rollout.prompts, rollout.latents, fresh.policy.steps).log_probs
        loss = objective(PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 2, rollout.ref_log_probs))
        slopes.append(torch.autograd.grad(loss, fresh.model.theta)[0])
    torch.testing.assert_close(ours.squeeze(), torch.stack(slopes).mean(), rtol=1e-4, atol=0)
