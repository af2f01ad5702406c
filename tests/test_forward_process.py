"""The forward-process module and its objectives: values and gradients of a linear model by hand, in float64."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import lightning_draft.forward_objectives as pointwise
import lightning_draft.group_objectives as grouped
from lightning_draft.advantages import GroupRelative
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.old_policy import OldParameters, OldPolicy
from lightning_draft.methods.rollout import Rollout
from lightning_draft.models.base import Conditioning
from lightning_draft.objectives import PPO, PRDP, PolicyBatch, Reinforce
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, Sampler
from lightning_draft.schedules import RectifiedFlow, Schedule, VariancePreserving
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import GaussianModel, LinearModel
from tests.tiny_policy_gradients import MILD, BlackBox, Cut, Recorder, data, trainer_of, values

PROMPTS = ["a red cat", "a cat"]
GROUP, THETA, OLD, BASE = 3, 0.3, 0.25, 0.2
VARIANTS: list[ForwardObjective] = [
    DiffusionNFT(0.5, advantage_clip=1.0),
    AWM(PPO(0.02, advantage_clip=None), power=1.0),
    AWM(Reinforce("sum")),
    RWR(0.7, max_weight=2.0),
    OnlineDPO(3.0),
    DGPO(2.0, clip=0.02, advantage_clip=1.2),
    DGPO(2.0, clip=None, reference="old"),
    CRD(0.8),
    CRD(0.8, "base"),
]
battery = pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: f"{type(o).__name__}")


def test_list_covers_every_objective() -> None:
    members = [each for module in (pointwise, grouped) for _, each in inspect.getmembers(module, inspect.isclass)]
    shipped = {each for each in members if issubclass(each, ForwardObjective)} - {ForwardObjective}
    assert {type(objective) for objective in VARIANTS} == shipped


def linear(**options: Any) -> ForwardProcessModule:
    """A module with a linear velocity model, whose base has `theta = BASE`."""
    defaults: dict[str, Any] = {
        "model": LinearModel(BASE, "flow", RectifiedFlow(), (3, 2, 2)),
        "reward": BlackBox(),
        "sampler": FlowEuler(4),
        "advantage_estimator": GroupRelative(divide_by_std=True),
        "samples_per_prompt": GROUP,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return ForwardProcessModule(**{**defaults, **options})


def in_float64(rollout: Rollout) -> Rollout:
    return replace(rollout, latents=rollout.latents.double(), advantages=rollout.advantages.double())


def moved(module: ForwardProcessModule) -> Rollout:
    """Collect a rollout with `theta = OLD`, then set `theta = THETA`."""
    module.model.theta.data.fill_(OLD)
    rollout = in_float64(module.collect_rollout(PROMPTS))
    module.model.theta.data.fill_(THETA)
    return rollout


def noised(module: ForwardProcessModule, rollout: Rollout, index: int, t: float) -> tuple[Tensor, Tensor]:
    """Return `x_t` and the network's target, with the noise of the documented seeds."""
    x0, shared = rollout.latents[-1], module.objective.shares_noise
    each = [
        module.model.noise(
            1, torch.Generator().manual_seed(derive_seed(0, 0, 0, i // GROUP if shared else i, 1, index))
        )
        for i in range(len(x0))
    ]
    eps = torch.cat(each).double()
    alpha, sigma = module.model.schedule.coefficients(t)
    target = eps - x0 if module.model.prediction == "flow" else eps
    return alpha * x0 + sigma * eps, target


def errors(x: Tensor, target: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Return `e = mean (theta x - u)^2` of each sample and `d e / d theta`."""
    difference = (theta * x - target).flatten(1)
    return difference.square().mean(1), 2 * (difference * x.flatten(1)).mean(1)


def by_hand(objective: ForwardObjective, x: Tensor, target: Tensor, advantages: Tensor, sigma: float) -> Tensor:
    """Return the loss and its derivative with respect to theta, from the papers' equations for a velocity model."""
    (e, de), (old, _), (ref, _) = (errors(x, target, theta) for theta in (THETA, OLD, BASE))
    A, groups = advantages, advantages.view(-1, GROUP)  # noqa: N806
    if isinstance(objective, DiffusionNFT):
        good, x0, total = A.clamp(-1, 1) / 2 + 0.5, x - sigma * target, torch.zeros(2, dtype=torch.float64)
        for weight, sign in ((good, 1), (1 - good, -1)):
            theta = OLD + sign * objective.beta * (THETA - OLD)
            difference = (x - sigma * theta * x - x0).flatten(1)
            scale = weight / difference.abs().mean(1) / objective.beta
            slope = -sign * objective.beta * sigma * x.flatten(1)
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
    if not flow and isinstance(objective, DiffusionNFT):
        pytest.skip("its equation by hand is for velocities")
    model = LinearModel(BASE, "flow" if flow else "epsilon", schedule, (3, 2, 2))
    module = linear(model=model, sampler=FlowEuler(4) if flow else DDIM(3), objective=objective)
    rollout = moved(module)
    (minibatch,) = module.minibatches(2)
    loss, logs = module.loss_and_logs(PROMPTS, rollout, minibatch)
    expected = torch.zeros(2, dtype=torch.float64)
    times = module.training_times(0, 0)
    for index, t in enumerate(times):
        x, target = noised(module, rollout, index, t)
        expected += by_hand(objective, x, target, rollout.advantages, schedule.coefficients(t)[1]) / len(times)
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


@battery
def test_number_of_network_calls(objective: ForwardObjective) -> None:
    """One call with gradient per time; one without for the base, and for a different old policy."""
    module = linear(objective=objective)
    rollout = module.collect_rollout(PROMPTS)
    (minibatch,) = module.minibatches(2)
    for has_moved in (False, True):
        module.model.calls_with_gradient = module.model.calls_without_gradient = 0
        module.loss_and_logs(PROMPTS, rollout, minibatch, moved=has_moved)
        assert module.model.calls_with_gradient == 4
        others = objective.needs_reference + (objective.needs_old and has_moved)
        assert module.model.calls_without_gradient == 4 * others


@battery
def test_minibatch_gradients_add_up_to_that_of_the_rollout(objective: ForwardObjective) -> None:
    gradients = []
    for options in ({}, {"micro_batch_size": GROUP, "timesteps_per_minibatch": 3}):
        module = linear(objective=objective, kl_weight=0.1, **options)
        rollout = moved(module)
        every = module.minibatches(2)
        losses = [each.fraction * module.loss_and_logs(PROMPTS, rollout, each)[0] for each in every]
        gradients.append(torch.autograd.grad(torch.stack(losses).sum(), module.model.theta)[0])
    assert len(every) == 4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_online_dpo_trains_on_the_best_and_the_worst_sample() -> None:
    chosen = OnlineDPO().select(torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -3.0]]))
    assert chosen.tolist() == [[0, 1], [1, 2]]


# Rollouts and the old policy.


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [(FlowEuler(4), RectifiedFlow()), (DDIM(3), MILD), (DDIM(3, eta=1.0), MILD), (DPMSolverPlusPlus(3), None)],
    ids=["flow", "ddim", "ddpm", "multistep"],
)
def test_rollouts_equal_samples_of_the_chain_for_any_micro_batch_size(sampler: Sampler, schedule: Any) -> None:
    model = LinearModel(BASE, "flow" if isinstance(schedule, RectifiedFlow) else "epsilon", schedule, (3, 2, 2))
    whole = linear(model=model, sampler=sampler).collect_rollout(PROMPTS)
    parts = linear(model=model, sampler=sampler, micro_batch_size=2).collect_rollout(PROMPTS)
    assert torch.equal(parts.latents, whole.latents)
    assert whole.latents.shape == (1, 2 * GROUP, 3, 2, 2)
    if sampler.step(model.schedule, torch.zeros(1), torch.zeros(1), *sampler.grid(model.schedule)[0])[0].std == 0:
        noise = model.noise(sampler.num_steps + 1, torch.Generator().manual_seed(derive_seed(0, 0, 0, 4)))[:1]
        chain = SamplingChain(model, sampler, model.encode(["a cat"]))
        assert torch.allclose(chain.advance(chain.start(noise)).x[0], whole.latents[0, 4], rtol=1e-6)


def test_the_old_policy_follows_the_parameters_and_samples_the_rollouts() -> None:
    """`theta_old <- d theta_old + (1 - d) theta` with a decay that grows from step 10 on, up to 0.5."""
    policy = OldPolicy(max_decay=0.5, rate=0.04, start=10)
    assert [policy.decay(step) for step in (0, 10, 15, 20, 100)] == pytest.approx([0, 0, 0.2, 0.4, 0.5])
    module = linear(old_policy=policy)
    module.collect_rollout(PROMPTS, 0, step=0)
    module.model.theta.data.fill_(0.9)
    rollout = module.collect_rollout(PROMPTS, 1, step=15)
    old = 0.2 * BASE + 0.8 * 0.9
    assert module.old.values["model.theta"].item() == pytest.approx(old)
    assert module.model.theta.item() == 0.9
    same = linear(model=LinearModel(old, "flow", RectifiedFlow(), (3, 2, 2))).collect_rollout(PROMPTS, 1)
    torch.testing.assert_close(rollout.latents, same.latents)


def test_old_and_current_values_are_not_confused_under_autocast() -> None:
    """Autocast keeps rounded parameters by their identity."""
    layer, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    parameters, old = dict(layer.named_parameters()), OldParameters(OldPolicy())
    layer.weight.data.fill_(2.0)
    old.update(parameters, 0)
    layer.weight.data.fill_(3.0)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with torch.no_grad(), old.in_use(parameters):
                found.append(layer(x).item())
            found.append(layer(x).item())
        assert torch.is_autocast_cache_enabled()
    assert found == [2.0, 3.0, 2.0, 3.0]


def test_training_times_cover_the_grid_or_the_schedule() -> None:
    grid = linear(sampler=FlowEuler(6), num_times=6)
    assert sorted(grid.training_times(0, 0)) == sorted(t for t, _ in FlowEuler(6).grid(RectifiedFlow()))
    assert grid.training_times(0, 0) != grid.training_times(1, 0) != grid.training_times(1, 1)
    assert len(set(linear(sampler=FlowEuler(6), num_times=2).training_times(0, 0))) == 2
    times = linear(times="uniform", num_times=10).training_times(3, 0)
    assert [int(10 * t) for t in times] == list(range(10))
    table = VariancePreserving(tuple(1 - i / 20 for i in range(1, 20)))
    discrete = linear(model=LinearModel(BASE, schedule=table), sampler=DDIM(2), times="uniform", num_times=19)
    assert discrete.training_times(0, 0) == list(range(19))


# Training.


def fit(folder: Path, module: ForwardProcessModule, steps: int, *callbacks: Callback, **options: Any) -> Recorder:
    recorder = Recorder()
    ckpt = options.pop("ckpt_path", None)
    trainer = trainer_of(folder, recorder, *callbacks, max_steps=steps, **options)
    trainer.fit(module, data(), ckpt_path=ckpt)
    return recorder


class Shifted(GaussianModel):
    """The exact denoiser of `N(mean, std^2)` with a trained mean."""

    def __init__(self) -> None:
        super().__init__(0.5, 0.3, RectifiedFlow(), (3, 1, 1))
        self.shift = nn.Parameter(torch.zeros(()))
        self.in_base = False

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the posterior mean for shifted data."""
        shift = self.shift * (not self.in_base)
        return super().forward(x - (1 - t) * shift, t, conditioning) + shift

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the shift is 0."""
        self.in_base = True
        yield
        self.in_base = False


@battery
def test_reward_without_gradient_increases(tmp_path: Path, objective: ForwardObjective) -> None:
    """The reward is the brightness, and the mean of the model increases."""
    module = linear(model=Shifted(), sampler=FlowEuler(3), objective=objective, samples_per_prompt=8)
    fit(tmp_path, module, 8)
    assert module.reward_queries == 8 * 16
    assert module.model.shift > 0.02


SETTINGS: dict[str, Any] = {
    "objective": DiffusionNFT(0.5),
    "old_policy": OldPolicy(0.5, rate=0.2),
    "inner_epochs": 2,
    "timesteps_per_minibatch": 2,
    "kl_weight": 0.1,
    "seed": 4,
}


@pytest.mark.parametrize("stop", [3, 4], ids=["within a rollout", "between rollouts"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        module = linear(**SETTINGS)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt}
        recorder = fit(tmp_path, module, steps, *callbacks, **options)
        return values(module), module.old.values["model.theta"], recorder.of("train/loss")

    straight = run(6)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    torch.manual_seed(99)
    resumed = run(6, ckpt=str(tmp_path / f"step={stop}.ckpt"))
    assert [*first[2], *resumed[2]] == straight[2]
    assert torch.equal(resumed[0]["model.theta"], straight[0]["model.theta"])
    assert torch.equal(resumed[1], straight[1])
    assert not torch.equal(straight[1], straight[0]["model.theta"])


def test_a_run_interrupted_in_the_first_minibatch_of_a_rollout_resumes_bitwise(tmp_path: Path) -> None:
    """The old policy was updated for this rollout, and is updated again."""

    def run(*callbacks: Callback, ckpt: Path | None = None) -> Any:
        module = linear(**SETTINGS)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt}
        fit(tmp_path, module, 6, LastCheckpoint(dirpath=str(tmp_path)), *callbacks, **options)
        return module.model.theta.item(), module.old.values["model.theta"].item()

    straight = run()
    with pytest.raises(SystemExit):
        run(Cut(9))
    assert run(ckpt=tmp_path / "last.ckpt") == straight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionNFT(0.0), "beta=0.0 must be a positive number"),
        (lambda: AWM(PRDP()), "policy=PRDP must be an objective of single steps"),
        (lambda: AWM(power=-1.0), "power=-1.0 must be at least 0"),
        (lambda: RWR(temperature=0.0), "temperature=0.0 must be a positive number"),
        (lambda: DGPO(reference="new"), "reference='new' is not a valid choice"),  # type: ignore[arg-type]
        (lambda: CRD(beta=-1.0), "beta=-1.0 must be a positive number"),
        (lambda: OldPolicy(max_decay=1.0), "old_policy.max_decay=1.0 must be between 0"),
        (lambda: linear(times="random"), "times='random' is not a valid choice"),
        (lambda: linear(num_times=5), "num_times=5 exceeds the sampler's num_steps=4"),
    ],
)
def test_invalid_options_are_configuration_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"samples_per_prompt": 1}, {}, "GroupRelative compares samples of the same prompt"),
        ({"objective": CRD(), "micro_batch_size": 2}, {}, "micro_batch_size=2 splits them; set .* multiple of .*=3"),
        ({"objective": AWM(Reinforce()), "inner_epochs": 2}, {}, "AWM is on-policy"),
        (
            {"timesteps_per_minibatch": 1},
            {"accumulate_grad_batches": 3},
            "optimizer steps would not end",
        ),
    ],
)
def test_invalid_combinations_are_errors_before_training(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, linear(**options), 1, **trainer)
