"""Gradient matching: targets against autograd through the chain, equations by hand, and optima in closed form."""

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import lightning_draft.gradient_matching as strategies
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.gradient_matching import AdjointMatching, GradientMatching, NablaGFlowNet, Trajectory, VGGFlow
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.models.base import Conditioning
from lightning_draft.samplers import DDIM, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.stochastic_flow import DanceSDE
from lightning_draft.testing import GaussianModel, LinearModel, LinearReward, scaled_linear
from tests.tiny_policy_gradients import MILD, BlackBox, Recorder, trainer_of
from tests.tiny_runs import data

PROMPTS = ["a red cat", "a cat"]
THETA, BASE = 0.3, 0.2
VARIANTS: list[GradientMatching] = [AdjointMatching(2.0), NablaGFlowNet(2.0), VGGFlow(2.0, clip=0.1)]
battery = pytest.mark.parametrize("matching", VARIANTS, ids=lambda m: type(m).__name__)


def test_list_covers_every_matching() -> None:
    members = [each for _, each in inspect.getmembers(strategies, inspect.isclass)]
    shipped = {each for each in members if issubclass(each, GradientMatching)} - {GradientMatching}
    assert {type(matching) for matching in VARIANTS} == shipped


class Curved(LinearModel):
    """A network that is not linear in the latent."""

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        return super().forward(torch.tanh(x), t, conditioning)


def quartic(latents: Tensor) -> Tensor:
    return -(latents - 0.4).pow(4).flatten(1).sum(1)


def gradient_of_quartic(latents: Tensor) -> Tensor:
    return -4 * (latents - 0.4).pow(3)


def sampled(model: LinearModel, sampler: Sampler) -> tuple[Trajectory, list[Tensor]]:
    """Return a trajectory of two samples in float64, and its noise."""
    torch.manual_seed(0)
    chain = SamplingChain(model, sampler, model.encode(PROMPTS))
    noise = list(torch.randn(chain.num_steps + 1, 2, 3, 2, 2, dtype=torch.float64))
    with torch.no_grad():
        latents = torch.stack([noise[0], *(x for _, x in chain.sample_steps(noise[0], noise[1:]))])
    return Trajectory(chain, latents, gradient_of_quartic), noise


@pytest.mark.parametrize(
    ("model", "sampler"),
    [
        (Curved(BASE, schedule=MILD, shape=(3, 2, 2)), DDIM(3, eta=1.0)),
        (Curved(BASE, "flow", RectifiedFlow(), (3, 2, 2)), FlowSDE(4, math.sqrt(2))),
    ],
    ids=["ddpm", "flow"],
)
def test_lean_adjoint_equals_the_gradient_through_the_base_chain(model: LinearModel, sampler: Sampler) -> None:
    """On a trajectory of the base it is `-scale d r(x_T) / d x_k` with the noise of each step fixed."""
    trajectory, noise = sampled(model, sampler)
    chain = trajectory.chain
    latents = [x for _, x in chain.sample_steps(noise[0].requires_grad_(), noise[1:])]
    gradients = torch.autograd.grad(quartic(latents[-1]).sum(), latents)
    steps = [0, 2]
    model.theta.data.fill_(THETA)  # the adjoint is pulled back through the base, whatever the model is now
    for step, target in zip(steps, AdjointMatching(2.0).targets(trajectory, steps), strict=True):
        torch.testing.assert_close(target, -2.0 * gradients[step], rtol=1e-12, atol=1e-14)
    model.theta.data.fill_(BASE)


def test_adjoint_matching_of_a_linear_model_and_reward_in_closed_form() -> None:
    """`x' = c_k x + std_k z` with `c_k = A_k + B_k theta`: the adjoint is a product of the base's `c`."""
    model = LinearModel(BASE, schedule=MILD, shape=(3, 2, 2))
    module = GradientMatchingModule(model, LinearReward(12.0), DDIM(3, eta=1.0), AdjointMatching(2.0))
    model.theta.data.fill_(THETA)
    trajectory, _ = sampled(model, module.sampler)
    trajectory = Trajectory(trajectory.chain, trajectory.latents, torch.ones_like)
    targets = module.matching.targets(trajectory, [0, 1, 2])
    losses = [module.matching.loss(module.residual(trajectory, k), targets[k]).mean() for k in range(3)]
    found = torch.autograd.grad(torch.stack(losses).mean(), model.theta)[0]
    factors, expected_loss, expected = [], 0.0, 0.0
    for t, s in module.sampler.grid(MILD):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = MILD.coefficients(t), MILD.coefficients(s)
        std = sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
        a, b = alpha_s / alpha_t, math.sqrt(sigma_s**2 - std**2) - alpha_s / alpha_t * sigma_t
        factors.append((a + b * BASE, b, std))
    for k, (_, b, std) in enumerate(factors):
        adjoint = -2.0 * math.prod(c for c, _, _ in factors[k + 1 :])
        x = trajectory.latents[k]
        error = b * (THETA - BASE) * x / std + std * adjoint
        expected_loss += error.square().flatten(1).sum(1).mean().item() / 3
        expected += (2 * error * b * x / std).flatten(1).sum(1).mean().item() / 3
    assert torch.stack(losses).mean().item() == pytest.approx(expected_loss, rel=1e-10)
    assert found.item() == pytest.approx(expected, rel=1e-10)


class Shifted(GaussianModel):
    """The exact denoiser of `N(mean, std^2)` with a mean that is trained."""

    def __init__(self, schedule: Any = None) -> None:
        super().__init__(0.5, 0.3, schedule, (3, 1, 1))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.in_base = False

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the posterior mean for data that are shifted."""
        alpha, _ = self.schedule.coefficients(t)
        shift = self.shift.to(x) * (not self.in_base)
        return super().forward(x - alpha * shift, t, conditioning) + shift

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the shift is 0."""
        self.in_base = True
        yield
        self.in_base = False


def optimal_shift(schedule: Any, sampler: Sampler) -> float:
    """Return where adjoint matching's loss, which is quadratic in the shift, has its minimum for a linear reward."""
    model = Shifted(schedule)
    module = GradientMatchingModule(model, LinearReward(), sampler, AdjointMatching(2.0))
    torch.manual_seed(0)
    chain = SamplingChain(model, sampler, model.encode(PROMPTS))
    with torch.no_grad():
        noise = torch.randn(chain.num_steps + 1, 2, 3, 1, 1, dtype=torch.float64)
        latents = torch.stack([noise[0], *(x for _, x in chain.sample_steps(noise[0], noise[1:]))])
    trajectory, steps = Trajectory(chain, latents, torch.ones_like), module._trainable_steps()
    targets = module.matching.targets(trajectory, steps)

    def slope(shift: float) -> float:
        model.shift.data.fill_(shift)
        losses = [module.matching.loss(module.residual(trajectory, k), a) for k, a in zip(steps, targets, strict=True)]
        return float(torch.autograd.grad(torch.stack(losses).mean(), model.shift)[0])

    return slope(0.0) / (slope(0.0) - slope(1.0))


def test_the_optimum_of_adjoint_matching_for_a_flow_is_the_tilted_distribution() -> None:
    """`N(m, s^2)` tilted by `exp(scale x)` is `N(m + scale s^2, s^2)`."""
    assert optimal_shift(RectifiedFlow(), FlowSDE(100, math.sqrt(2))) == pytest.approx(2.0 * 0.3**2, rel=0.05)


def test_the_optimum_of_adjoint_matching_for_ddpm_in_closed_form() -> None:
    """With `V_t` the variance of `x_t`, a shift `d` of the data moves the mean of `x_s` given `x_t` by `D d`,

    `D = alpha_s (1 - (alpha_t / alpha_s)^2 V_s / V_t)`, the adjoint is `-scale d E[x_0 | x_s] / d x_s = -scale alpha_s
    s^2 / V_s`, and the loss is a sum of squares of `D d / std + std a`.
    """
    sampler, schedule = DDIM(20, eta=1.0), scaled_linear()
    above, below = 0.0, 0.0
    for t, s in sampler.grid(schedule)[:-1]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t), schedule.coefficients(s)
        var_t, var_s = (alpha**2 * 0.3**2 + sigma**2 for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        moved = alpha_s * (1 - (alpha_t / alpha_s) ** 2 * var_s / var_t)
        std = sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
        above += moved * 2.0 * alpha_s * 0.3**2 / var_s
        below += (moved / std) ** 2
    assert optimal_shift(None, sampler) == pytest.approx(above / below, rel=1e-6)
    assert 0.12 < above / below < 2.0 * 0.3**2  # below the continuous optimum, as DDPM's fixed-small variance is


def test_targets_of_nabla_gflownet_are_scaled_gradients_at_the_estimate_after_the_step() -> None:
    """By autograd on the straight-line estimate; after the last step the estimate is the sample."""
    model = Curved(BASE, schedule=MILD, shape=(3, 2, 2))
    model.theta.data.fill_(THETA)
    trajectory, _ = sampled(model, DDIM(3, eta=1.0))
    targets = NablaGFlowNet(5.0).targets(trajectory, [0, 1, 2])
    for step, target in enumerate(targets):
        x = trajectory.latents[step + 1].clone().requires_grad_()
        alpha, sigma = (1.0, 0.0) if step == 2 else MILD.coefficients(trajectory.chain.grid[step + 1][0])
        estimate = (x - sigma * THETA * torch.tanh(x)) / alpha
        expected = 5.0 * alpha**2 * torch.autograd.grad(quartic(estimate).sum(), x)[0]
        torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-12)


def test_targets_of_vgg_flow_are_clipped_and_point_towards_more_reward() -> None:
    """`v* - v_base = -(1 - t)^2 scale g`; the epsilon of a variance-preserving model moves the same way."""
    for prediction, schedule, sampler in (("flow", RectifiedFlow(), FlowEuler(4)), ("epsilon", MILD, DDIM(3))):
        model = Curved(BASE, prediction, schedule, (3, 2, 2))  # type: ignore[arg-type]
        trajectory, _ = sampled(model, sampler)
        for clip in (1e9, 0.05):
            target = VGGFlow(3.0, clip).targets(trajectory, [1])[0]
            x, (t, _) = trajectory.latents[1], trajectory.chain.grid[1]
            alpha, sigma = schedule.coefficients(t)
            raw = BASE * torch.tanh(x)
            g = gradient_of_quartic(x - t * raw if prediction == "flow" else (x - sigma * raw) / alpha)
            norm = g.flatten(1).norm(dim=1).view(2, 1, 1, 1)
            expected = -3.0 * alpha**2 * g * torch.minimum(torch.ones_like(norm), clip / norm)
            torch.testing.assert_close(target, expected, rtol=1e-12, atol=0)


def linear(matching: GradientMatching, **options: Any) -> GradientMatchingModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(BASE, schedule=MILD, shape=(3, 2, 2)),
        "reward": LinearReward(1.0),
        "sampler": DDIM(3, eta=1.0),
        "matching": matching,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return GradientMatchingModule(**{**defaults, **options})


def test_residuals_are_the_changes_of_prediction_and_mean() -> None:
    """`loss` of each matching by its equation."""
    module = linear(VARIANTS[0])
    module.model.theta.data.fill_(THETA)
    trajectory, _ = sampled(module.model, module.sampler)
    x, (t, s) = trajectory.latents[1], trajectory.chain.grid[1]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = MILD.coefficients(t), MILD.coefficients(s)
    std = sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
    change = (THETA - BASE) * x
    mean = (math.sqrt(sigma_s**2 - std**2) - alpha_s / alpha_t * sigma_t) * change
    residual, target = module.residual(trajectory, 1), torch.full_like(x, 0.7)
    equations = {
        AdjointMatching: (mean / std + std * 0.7).square().flatten(1).sum(1),
        NablaGFlowNet: (mean / std**2 - 0.7).square().flatten(1).mean(1),
        VGGFlow: (change - 0.7).square().flatten(1).mean(1),
    }
    for matching in VARIANTS:
        torch.testing.assert_close(matching.loss(residual, target), equations[type(matching)], rtol=1e-9, atol=1e-12)


@battery
def test_number_of_network_calls_and_reward_queries(matching: GradientMatching) -> None:
    """With gradient: one per trained step and per target that is pulled back. Rewards: the samples and the targets."""
    module = linear(matching, trained_steps=2, checkpointing="none")
    generator = torch.Generator().manual_seed(1)
    steps = SamplingChain(module.model, module.sampler, module.model.encode(["a"]), generator=generator)
    chosen = steps.choose([1.0] * 3, 2)
    module.loss_and_logs(PROMPTS, torch.Generator().manual_seed(1))
    later = sum(step < 2 for step in chosen)
    pulled = {AdjointMatching: 2 - chosen[0], NablaGFlowNet: later, VGGFlow: 0}[type(matching)]
    estimates = {AdjointMatching: 0, NablaGFlowNet: later, VGGFlow: 2}[type(matching)]
    assert module.model.calls_with_gradient == 2 + pulled
    assert module.model.calls_without_gradient == 3 + 2 + estimates
    assert module.reward_queries == 2 * (1 + (1 if isinstance(matching, AdjointMatching) else 2))


@battery
def test_recomputation_and_micro_batches_change_no_gradient(matching: GradientMatching) -> None:
    found = []
    for options in ({"checkpointing": "none"}, {"checkpointing": "step"}, {"micro_batch_size": 1}):
        module = linear(matching, **options)
        module.model.theta.data.fill_(THETA)
        torch.manual_seed(3)
        loss, _ = module.loss_and_logs(PROMPTS)
        found.append(torch.autograd.grad(loss, module.model.theta)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-5, atol=1e-9)


def fit(folder: Path, module: GradientMatchingModule, steps: int, *callbacks: Callback, **options: Any) -> Recorder:
    recorder, ckpt = Recorder(), options.pop("ckpt_path", None)
    trainer = trainer_of(folder, recorder, *callbacks, max_steps=steps, **options)
    trainer.fit(module, data(), ckpt_path=ckpt)
    return recorder


@battery
def test_reward_increases(tmp_path: Path, matching: GradientMatching) -> None:
    """The reward is the brightness, and the mean of the model increases."""
    module = linear(matching, model=Shifted(MILD), trained_steps=2)
    fit(tmp_path, module, 5)
    assert module.model.shift > 0.02


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> tuple[float, list[float]]:
        module = linear(AdjointMatching(2.0), trained_steps=1)
        recorder = fit(tmp_path, module, steps, *callbacks, enable_checkpointing=True, ckpt_path=ckpt)
        return module.model.theta.item(), recorder.of("train/loss")

    straight = run(4)
    first = run(2, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1))
    torch.manual_seed(99)
    resumed = run(4, ckpt=str(tmp_path / "step=2.ckpt"))
    assert resumed[0] == straight[0]
    assert [*first[1], *resumed[1]] == straight[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": AdjointMatching(), "sampler": DDIM(3)}, "AdjointMatching trains only steps that add noise"),
        ({"matching": NablaGFlowNet(), "trained_steps": 4}, "trained_steps=4 exceeds the 3 steps that NablaGFlowNet"),
        ({"matching": VGGFlow(), "reward": BlackBox()}, "BlackBox is not differentiable"),
    ],
)
def test_invalid_combinations_are_errors_before_training(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, linear(**options), 1)


@pytest.mark.parametrize(
    ("sampler", "memoryless"),
    [(DDIM(100, eta=1.0), True), (DDIM(100, eta=0.5), False), (DDIM(100), False)]
    + [(FlowSDE(100, 1.4142), True), (FlowSDE(100, 0.3), False), (DanceSDE(100, 0.3), False)],
)
def test_samples_of_a_memoryless_sampler_do_not_correlate_with_the_noise(sampler: Sampler, memoryless: bool) -> None:
    """For data `N(0, 0.09)`, whose posterior mean is linear, the covariance is the product of the steps' slopes."""
    schedule: Any = RectifiedFlow() if isinstance(sampler, FlowSDE) else scaled_linear()
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t, s in sampler.grid(schedule):
        alpha, sigma = schedule.coefficients(t)
        x0 = x * alpha * 0.09 / (alpha**2 * 0.09 + sigma**2)
        x = sampler.step(schedule, x, x0, t, s)[0].mean
    assert (abs(x.item()) / 0.3 < 0.05) == memoryless, x.item() / 0.3
    assert sampler.is_memoryless == memoryless


def test_adjoint_matching_warns_of_a_sampler_that_is_not_memoryless() -> None:
    def check(**options: Any) -> None:
        GradientMatchingModule(LinearModel(), LinearReward(), **options).check_configuration()

    with pytest.warns(UserWarning, match=r"DDIM with these options is not memoryless.*use DDIM\(eta=1\)"):
        check(sampler=DDIM(3, eta=0.5), matching=AdjointMatching())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(sampler=DDIM(3, eta=1.0), matching=AdjointMatching())
        check(sampler=DDIM(3, eta=0.5), matching=NablaGFlowNet())


def test_invalid_options_are_configuration_errors() -> None:
    for make in (lambda: AdjointMatching(0.0), lambda: NablaGFlowNet(-1.0), lambda: VGGFlow(clip=0.0)):
        with pytest.raises(ConfigurationError, match="must be a positive number"):
            make()
