"""Policy gradients: correct gradients for every split into minibatches, rollouts, checkpoints and processes."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_draft.advantages import GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.callbacks.lora_header import header
from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy import stochastic_steps
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.methods.rollout import Rollout, summarize
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.objectives import PPO, PRDP, Objective, PolicyBatch, Reinforce
from lightning_draft.rewards import Brightness, ColorBalance, Reward, Sharpness, WeightedReward, ZScoreSum
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowSDE
from lightning_draft.schedules import RectifiedFlow, VariancePreserving
from lightning_draft.testing import GaussianModel, LinearModel, LinearReward, scaled_linear

PROMPTS = ["a red cat", "a cat", "red", "cat dog", "tree", "a dog"]
MILD = VariancePreserving((0.9, 0.7, 0.4), final_alpha_cumprod=0.97, spacing="trailing")
"""Three steps, the last one noisy too, that leave latents of the size of images."""


class BlackBox(LinearReward):
    differentiable = False

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(super().forward(images, prompts).numpy())


def linear(**options: Any) -> PolicyGradientModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": BlackBox(),
        "sampler": DDIM(4, eta=1.0),
        "advantage_estimator": LeaveOneOut(),
        "samples_per_prompt": 2,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return PolicyGradientModule(**{**defaults, **options})


def make(folder: Path, *, model: dict[str, Any] | None = None, **options: Any) -> PolicyGradientModule:
    """A pipeline with reproducible initial adapters."""
    lora = LoRA(4, alpha=8.0, target_modules=["to_v", "conv_out"], seed=0)
    settings = {"guidance": Guidance(1.0), "lora": lora, **(model or {})}
    defaults = {"model": StableDiffusion(str(folder), **settings), "reward": ColorBalance()}
    return linear(**{**defaults, "sampler": DDIM(3, eta=1.0, spacing="trailing"), **options})


def stir(module: PolicyGradientModule) -> PolicyGradientModule:
    """Set the adapters to random values, so that the model differs from its base."""
    generator = torch.Generator().manual_seed(3)
    for value in module.trainable_parameters().values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator).to(value)
    return module


def data(batch_size: int = 2) -> PromptDataModule:
    return PromptDataModule(PROMPTS, batch_size=batch_size, val_size=2)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


class Recorder(Callback):
    """Records the logged values and the gradient of every optimization step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.gradients: list[Tensor] = []
        self._last = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = pl_module.trainable_parameters().values()
        self.gradients.append(torch.cat([value.grad.flatten() for value in parameters]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.steps.append(logged)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def fit(folder: Path, module: PolicyGradientModule, steps: int = 1, batch_size: int = 2, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer_of(folder, recorder, max_steps=steps, **options).fit(module, data(batch_size))
    return recorder


# The gradient.


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
    module.kl_weight = 0.0
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


def test_samples_of_a_prompt_can_share_the_starting_noise() -> None:
    whole = linear(share_start_noise=True).collect_rollout(PROMPTS[:2]).latents
    parts = linear(share_start_noise=True, micro_batch_size=3).collect_rollout(PROMPTS[:2]).latents
    assert torch.equal(whole, parts)
    assert torch.equal(whole[0, 0], whole[0, 1])
    assert not torch.isclose(whole[0, 1], whole[0, 2]).any()
    assert not torch.isclose(whole[1, 0], whole[1, 1]).all()


# Parts.


def test_rollouts_do_not_depend_on_micro_batches(tiny_sd: Path) -> None:
    """Bitwise for elementwise arithmetic; otherwise up to rounding."""

    class Wordy(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().forward(images, prompts) + torch.tensor([float(len(prompt)) for prompt in prompts])

    for make_one, exact in ((linear, True), (lambda **options: stir(make(tiny_sd, **options)), False)):
        whole = make_one(objective=PRDP(), reward=Wordy()).collect_rollout(PROMPTS[:3], number=5)
        for size in (1, 4):
            pieces = make_one(objective=PRDP(), reward=Wordy(), micro_batch_size=size).collect_rollout(
                PROMPTS[:3], number=5
            )
            for name in ("latents", "log_probs", "ref_log_probs", "rewards", "advantages"):
                ours, theirs = getattr(pieces, name), getattr(whole, name)
                assert torch.equal(ours, theirs) or not exact, name
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rollouts_depend_only_on_seed_and_number() -> None:
    """Also if a reward uses random numbers."""

    class Moody(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.rand(len(prompts))

    def collect(seed: int, number: int, before: int) -> Rollout:
        torch.manual_seed(before)
        state = torch.get_rng_state()
        rollout = linear(seed=seed, reward=Moody()).collect_rollout(PROMPTS[:2], number)
        assert torch.equal(torch.get_rng_state(), state)
        return rollout

    one, again = collect(0, 0, before=1), collect(0, 0, before=2)
    assert torch.equal(again.latents, one.latents)
    assert torch.equal(again.rewards, one.rewards)
    assert len(one.latents.unique()) == one.latents.numel()
    for other in (collect(0, 1, before=1), collect(1, 0, before=1)):
        assert not torch.isclose(other.latents[0], one.latents[0]).any()
        assert not torch.isclose(other.rewards, one.rewards).any()


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
        log_probs, _ = fresh.policy.evaluate(rollout.prompts, rollout.latents, fresh.policy.steps)
        loss = objective(PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 2, rollout.ref_log_probs))
        slopes.append(torch.autograd.grad(loss, fresh.model.theta)[0])
    torch.testing.assert_close(ours.squeeze(), torch.stack(slopes).mean(), rtol=1e-4, atol=0)


def test_two_pass_gradient_of_prdp_equals_autograd() -> None:
    """In float64, after an update of the model, for a rollout with three samples per prompt."""
    module = linear(
        objective=PRDP(beta=0.1, clip=1e-3), samples_per_prompt=3, micro_batch_size=2, timesteps_per_minibatch=1
    )
    collected, every = module.collect_rollout(PROMPTS[:2]), [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    doubled = {
        name: getattr(collected, name).double() for name in ("latents", "log_probs", "ref_log_probs", "advantages")
    }
    rollout = replace(collected, **doubled)
    module.model.theta.data += 0.01
    derivatives = module.log_prob_gradients(PROMPTS[:2], rollout)
    minibatches = module.minibatches(2)
    assert len(minibatches) == 9
    ours = sum(
        torch.autograd.grad(
            minibatch.fraction * module.loss_and_logs(PROMPTS[:2], rollout, minibatch, derivatives)[0], theta
        )[0]
        for minibatch in minibatches
        for theta in [module.model.theta]
    )
    log_probs = module.policy.evaluate(every, rollout.latents, module.policy.steps)[0]
    batch = PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 3, rollout.ref_log_probs)
    loss = module.objective(batch)
    assert derivatives.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert 0 < module.objective.clipped(batch).double().mean() < 1
    torch.testing.assert_close(ours, torch.autograd.grad(loss, module.model.theta)[0], rtol=1e-9, atol=0)


def test_every_update_of_prdp_uses_the_current_model(tmp_path: Path) -> None:
    """The second update of a rollout, compared with autograd and explicit log-probabilities of the base."""
    start, lr = torch.tensor(0.15), 4e-3
    module = linear(
        objective=PRDP(beta=0.1, clip=10.0),
        inner_epochs=2,
        kl_weight=2.0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
    )
    module.model.theta.data.copy_(start)
    recorder = fit(tmp_path, module, steps=2)
    first, second = recorder.gradients
    rollout, fresh = module.buffer.rollout, linear()
    assert rollout is not None
    reference = fresh.policy.log_probs(rollout.prompts, rollout.latents)
    fresh.model.theta.data.copy_(start - lr * first.squeeze())
    log_probs, divergence = fresh.policy.evaluate(rollout.prompts, rollout.latents, fresh.policy.steps, with_kl=True)
    assert divergence is not None
    loss = module.objective(PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 2, reference))
    assert recorder.of("train/policy_loss")[1] == pytest.approx(loss.item(), rel=1e-4)
    assert recorder.of("train/loss")[1] == pytest.approx((loss + 2.0 * divergence).item(), rel=1e-4)
    pull = torch.autograd.grad(2.0 * divergence, fresh.model.theta, retain_graph=True)[0]
    expected = torch.autograd.grad(loss, fresh.model.theta)[0]
    assert pull > 1e-2 * expected.abs()
    expected += pull
    torch.testing.assert_close(second.squeeze(), expected, rtol=1e-4, atol=0)
    assert (second - first).abs() > 1e-2 * first.abs()


def test_memory_of_prdp_does_not_grow_with_the_steps(tiny_sd: Path) -> None:
    """Number of saved elements for the backward pass of a minibatch, including the gradients of log-probabilities."""

    def kept(steps: int) -> int:
        module = make(
            tiny_sd, objective=PRDP(), timesteps_per_minibatch=1, sampler=DDIM(steps, eta=1.0, spacing="trailing")
        )
        rollout, elements = module.collect_rollout(PROMPTS[:1]), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            derivatives = module.log_prob_gradients(PROMPTS[:1], rollout)
            module.loss_and_logs(PROMPTS[:1], rollout, module.minibatches(1)[0], derivatives)
        return elements

    assert kept(9) < 1.01 * kept(3)


def test_sampled_steps_equal_those_of_the_chain_and_their_transitions_are_reproduced(tiny_sd: Path) -> None:
    module = make(tiny_sd)
    chain = SamplingChain(module.model, DDIM(3, eta=1.0), module.model.encode(PROMPTS[:2]))
    torch.manual_seed(0)
    noise = torch.randn(4, 2, *module.model.latent_shape)
    with torch.no_grad():
        walk = list(chain.sample_steps(noise[0], noise[1:]))
        state = chain.start(noise[0])
        for (transition, x), fresh in zip(walk, noise[1:], strict=True):
            expected = chain.transition(state)
            assert torch.equal(x, expected.mean + expected.std * fresh)
            assert torch.equal(transition.mean, expected.mean)
            state = replace(state, x=x, step=state.step + 1)
    again = chain.transitions_at(torch.stack([noise[0], *(x for _, x in walk)]), range(3))
    for (transition, x), other in zip(walk, again, strict=True):
        assert torch.equal(other.log_prob(x), transition.log_prob(x))


def test_prompts_are_repeated_for_all_training_steps_of_their_rollout(tmp_path: Path) -> None:
    """Every prompt is used, epochs consist of complete rollouts, and a resumed loader continues at its position."""
    module, datamodule = linear(inner_epochs=2, timesteps_per_minibatch=1), data()
    trainer_of(tmp_path, max_epochs=1).fit(module, datamodule)
    loader = datamodule.train_dataloader()
    assert len(loader) == 2 * 6
    start = loader.state_dict()["position"]
    seen = list(loader)
    assert all(seen[i] == seen[i - i % 6] for i in range(12))
    assert sorted(seen[0] + seen[6]) == sorted(datamodule.train_prompts)
    assert module.reward_queries == 2 * 2 * 2
    again = datamodule.train_dataloader()
    again.load_state_dict({"position": start + 7})
    assert list(again) == seen[7:]


# Training.


@pytest.mark.parametrize(
    ("objective", "advantage_estimator", "epochs"),
    [
        (Reinforce(), PerPromptStatistics(8, 4), 1),
        (PPO(clip=1e-2), PerPromptStatistics(8, 4), 2),
        (PPO(clip=1e-2), LeaveOneOut(), 2),
        (PPO(clip=1e-2), GroupRelative(divide_by_std=True), 2),
        (PRDP(beta=0.01, clip=1e-2), GroupRelative(), 2),
    ],
    ids=["REINFORCE", "PPO", "LOOP", "GRPO", "PRDP"],
)
def test_reward_without_gradient_increases(
    tmp_path: Path, objective: Objective, advantage_estimator: Any, epochs: int
) -> None:
    """The model can only scale its images: their JPEG size, which has no gradient, decreases."""

    class Small(Reward):
        differentiable = False

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return -torch.tensor([float(image.numpy().std()) for image in images])

    module = linear(
        model=LinearModel(0.1, schedule=MILD),
        sampler=DDIM(3, eta=1.0),
        reward=Small(),
        objective=objective,
        advantage_estimator=advantage_estimator,
        inner_epochs=epochs,
        samples_per_prompt=8,
    )
    recorder = fit(tmp_path, module, steps=30)
    rewards = recorder.of("train/reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.005
    assert module.reward_queries == 16 * 30 // epochs


def test_only_adapters_change_and_validation_is_that_of_all_methods(tiny_sd: Path, tmp_path: Path) -> None:
    module = make(tiny_sd, reward=ColorBalance(), timesteps_per_minibatch=1)
    before = values(module)
    trainer = trainer_of(tmp_path, max_steps=2, accumulate_grad_batches=3, limit_val_batches=None)
    (first,) = trainer.validate(module, data(), verbose=False)
    assert first["val/gain"] == 0
    trainer.fit(module, data())
    after, trained = values(module), module.trainable_parameters().keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in trained), name
    assert trainer.callback_metrics["val/gain"] != 0
    assert header(trainer, module)["method"] == "PPO(reduction='mean', clip=0.0001, advantage_clip=5.0, form='min')"


def test_logged_metrics_of_a_rollout_equal_their_formulas() -> None:
    class Fixed(Reward):
        differentiable = False

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.tensor([1.0, 3.0, 5.0, 5.0])

        def breakdown(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            assert 0 <= images.min() <= images.max() <= 1
            return self(images, prompts), {"half": self(images, prompts) / 2}

    rollout = linear(reward=Fixed(), advantage_estimator=GroupRelative()).collect_rollout(PROMPTS[:2])
    assert rollout.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert rollout.advantages.tolist() == [-1, 1, 0, 0]
    assert rollout.summary == pytest.approx(
        {
            "train/reward": 3.5,
            "train/reward/half": 1.75,
            "train/reward_within_prompts": 0.5,
            "train/reward_worst_prompt": 2,
            "train/reward_best_prompt": 5,
            "train/advantage_std": 0.5**0.5,
            "train/zero_advantage_groups": 0.5,
        }
    )


def test_zero_advantage_groups_are_those_with_only_zero_advantages() -> None:
    advantages = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, -1.0])
    assert summarize(torch.zeros(6), advantages, 3)["train/zero_advantage_groups"] == 0.5


# Checkpoints.


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, {"objective": PPO(clip=1e-2), "inner_epochs": 2, "advantage_estimator": PerPromptStatistics(6, 3)}),
        (4, {"objective": PPO(clip=1e-2), "inner_epochs": 2, "advantage_estimator": PerPromptStatistics(6, 3)}),
        (3, {"objective": PRDP(clip=1e-2), "inner_epochs": 2, "advantage_estimator": GroupRelative()}),
        (3, {"objective": Reinforce(), "advantage_estimator": PerPromptStatistics(6, 3)}),
    ],
    ids=["PPO within a rollout", "PPO between rollouts", "PRDP within a rollout", "REINFORCE"],
)
@pytest.mark.parametrize("pipeline", [False, True], ids=["linear", "pipeline"])
def test_resumed_run_equals_uninterrupted_run(
    tiny_sd: Path, tmp_path: Path, stop: int, options: dict[str, Any], pipeline: bool
) -> None:
    settings = {"timesteps_per_minibatch": 1, "seed": 4, **options}

    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        settings["advantage_estimator"] = type(options["advantage_estimator"])(
            *([6, 3] * isinstance(options["advantage_estimator"], PerPromptStatistics))
        )
        module = make(tiny_sd, **settings) if pipeline else linear(**settings)
        recorder = Recorder()
        trainer = trainer_of(
            tmp_path, recorder, *callbacks, max_steps=steps, accumulate_grad_batches=3, enable_checkpointing=True
        )
        trainer.fit(module, data(), ckpt_path=ckpt)
        return values(module), trainer.optimizers[0].state_dict()["state"], recorder

    straight = run(6)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    file = tmp_path / f"step={stop}.ckpt"
    kept = torch.load(file, weights_only=True)["rollouts"]
    assert [state["rollout"] is None for state in kept] == [stop == 4 or "inner_epochs" not in options]
    torch.manual_seed(99)
    resumed = run(6, ckpt=str(file))
    assert [*first[2].of("train/reward"), *resumed[2].of("train/reward")] == straight[2].of("train/reward")
    for name, value in straight[0].items():
        assert torch.equal(resumed[0][name], value), name
    for index, moments in straight[1].items():
        for name, value in moments.items():
            assert torch.equal(resumed[1][index][name], value), (index, name)


class Cut(Callback):
    """Raises Ctrl-C before a backward pass."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_before_backward(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("at", "accumulate", "options"),
    [
        (9, 3, {"objective": PPO(clip=1e-2), "inner_epochs": 2}),
        (12, 3, {"objective": PPO(clip=1e-2), "inner_epochs": 2}),
        (9, 3, {"objective": Reinforce()}),
        (11, 6, {"objective": Reinforce()}),
        (12, 3, {"objective": PRDP(clip=1e-2), "inner_epochs": 2}),
    ],
    ids=["last part of a pass", "last of a rollout", "last of the only pass", "in a step's second rollout", "PRDP"],
)
def test_run_interrupted_within_a_rollout_resumes_bitwise(
    tmp_path: Path, at: int, accumulate: int, options: dict[str, Any]
) -> None:
    """The statistics of advantage estimator and reward from the interrupted step are discarded."""

    def run(*callbacks: Callback, ckpt: Path | None = None) -> Any:
        parts = {"bright": WeightedReward(Brightness(0.2), 3.0), "sharp": WeightedReward(Sharpness(), -1.0)}
        reward, estimator = ZScoreSum(parts), PerPromptStatistics(6, 3)
        module = linear(reward=reward, advantage_estimator=estimator, timesteps_per_minibatch=1, **options)
        saving = LastCheckpoint(dirpath=str(tmp_path))
        settings = {"max_steps": 6, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
        trainer_of(tmp_path, saving, *callbacks, **settings).fit(module, data(), ckpt_path=ckpt)
        return module.model.theta.item(), estimator.state_dict(), reward.get_extra_state()

    straight = run()
    with pytest.raises(SystemExit):
        run(Cut(at))
    assert run(ckpt=tmp_path / "last.ckpt") == straight


@pytest.mark.parametrize("trainable", ["full", ["attn2"]], ids=str)
def test_prdp_trains_full_weights_and_resumes_bitwise(trainable: Any, tiny_sd: Path, tmp_path: Path) -> None:
    """The reference is the model before training, and a checkpoint contains only the trained weights."""

    def run(steps: int, *callbacks: Callback, ckpt: Path | None = None) -> PolicyGradientModule:
        module = make(
            tiny_sd,
            model={"trainable": trainable},
            objective=PRDP(beta=0.1, clip=1e-2),
            advantage_estimator=GroupRelative(),
            inner_epochs=2,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        )
        saving = {"enable_checkpointing": bool(callbacks)}
        trainer_of(tmp_path, *callbacks, max_steps=steps, **saving).fit(module, data(), ckpt_path=ckpt)
        return module

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    straight, resumed = run(4, saver), run(4, ckpt=tmp_path / "step=3.ckpt")
    before, after, again = values(make(tiny_sd, model={"trainable": trainable})), values(straight), values(resumed)
    trained = straight.trainable_parameters()
    chosen = {name for name in before if name.startswith("model.unet.") and (trainable == "full" or ".attn2." in name)}
    assert trained.keys() == chosen
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"].keys() == chosen
    for name, value in after.items():
        assert torch.equal(value, again[name]), name
        if name not in chosen:
            assert torch.equal(value, before[name]), name
    assert sum(not torch.equal(after[name], before[name]) for name in chosen) > 0.9 * len(chosen)
    rollout = straight.buffer.rollout  # collected after two optimizer steps
    assert rollout is not None
    fresh = make(tiny_sd, model={"trainable": trainable})
    reference = fresh.policy.log_probs(rollout.prompts, rollout.latents)
    assert rollout.ref_log_probs is not None
    assert torch.equal(rollout.ref_log_probs, reference)
    assert not torch.equal(rollout.log_probs, reference)


# Several processes.


class Note(Callback):
    """Records the random choices and the final parameters of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        notes = {
            "rollout": pl_module.buffer.rollout.state_dict(),
            "theta": pl_module.model.theta.detach(),
            "advantage_estimator": pl_module.advantage_estimator.state_dict(),
        }
        torch.save(notes, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize(
    "first", [linear(), DraftModule(LinearModel(), LinearReward(), DDIM(4))], ids=["LOOP", "DRaFT"]
)
def test_a_checkpoint_of_another_advantage_estimator_or_method_loads_without_the_missing_state(
    first: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    other = linear(advantage_estimator=PerPromptStatistics())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint is of")
        trainer_of(tmp_path, max_steps=2).fit(other, data(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert len(other.advantage_estimator.state_dict()["seen"]) == 2


def test_two_processes_share_parameters_and_advantage_estimator_but_not_noise(tmp_path: Path) -> None:
    """The update is that of the mean of their gradients, with advantages from the rewards of both."""

    def module() -> PolicyGradientModule:
        return linear(
            advantage_estimator=PerPromptStatistics(4, 4),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            timesteps_per_minibatch=1,
        )

    options = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 3}
    trainer_of(tmp_path, Note(tmp_path), max_steps=1, **options).fit(module(), data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["theta"], two["theta"])
    assert one["advantage_estimator"] == two["advantage_estimator"]
    assert set(one["rollout"]["prompts"]).isdisjoint(two["rollout"]["prompts"])
    assert not torch.isclose(one["rollout"]["latents"][0], two["rollout"]["latents"][0]).any()
    rewards = torch.cat([notes["rollout"]["rewards"] for notes in (one, two)])
    advantages = torch.cat([notes["rollout"]["advantages"] for notes in (one, two)])
    torch.testing.assert_close(advantages, (rewards - rewards.mean()) / rewards.std(correction=0), rtol=1e-4, atol=1e-4)

    slopes = []
    for notes in (one, two):
        alone, rollout = module(), Rollout(**notes["rollout"])
        alone.timesteps_per_minibatch = None
        prompts = rollout.prompts[::2]
        loss, _ = alone.loss_and_logs(prompts, rollout, alone.minibatches(2)[0])
        slopes.append(torch.autograd.grad(loss, alone.model.theta)[0])
    assert one["theta"].item() == pytest.approx((0.1 - 0.1 * torch.stack(slopes).mean()).item(), rel=1e-6)


def test_each_process_resumes_with_its_own_rollout(tmp_path: Path) -> None:
    """Within a rollout; a single process collects a new rollout and warns."""
    settings = {"objective": PPO(clip=1e-2), "inner_epochs": 2}
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": True}
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    def run(steps: int, *callbacks: Callback, ckpt: Path | None = None) -> list[dict[str, Any]]:
        trainer = trainer_of(tmp_path, Note(tmp_path), *callbacks, max_steps=steps, **options)
        trainer.fit(linear(**settings), data(), ckpt_path=ckpt)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    straight = run(4)
    run(3, saving)
    resumed = run(4, ckpt=tmp_path / "step=3.ckpt")
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours["theta"], theirs["theta"])
        assert torch.equal(ours["rollout"]["latents"], theirs["rollout"]["latents"])
    with pytest.warns(UserWarning, match="of 2 processes and there are 1 now: the rollout is collected again"):
        trainer_of(tmp_path, max_steps=4).fit(linear(**settings), data(), ckpt_path=tmp_path / "step=3.ckpt")


# What is refused.


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"objective": Reinforce(), "inner_epochs": 2}, {}, "Reinforce is on-policy.* set inner_epochs to 1 and tr"),
        (
            {"objective": Reinforce(), "timesteps_per_minibatch": 1},
            {},
            "on-policy: .*set trainer.accumulate_grad_batches to 3, or use PPO",
        ),
        (
            {"objective": PRDP(), "timesteps_per_minibatch": 1},
            {},
            "PRDP couples .*set trainer.accumulate_grad_batches to 3",
        ),
        (
            {"objective": PRDP(), "inner_epochs": 2},
            {"accumulate_grad_batches": 2},
            "PRDP couples .*set trainer.accumulate_grad_batches to 1",
        ),
        (
            {"timesteps_per_minibatch": 1},
            {"accumulate_grad_batches": 2},
            "would not end with rollouts, because accumulate_grad_batches=2 .* in 3 training steps; set .* to 3",
        ),
        ({"sampler": DDIM(4)}, {}, r"DDIM adds no noise.*DDIM\(eta=1\)"),
        ({"sampler": DPMSolverPlusPlus(4)}, {}, "DPMSolverPlusPlus adds no noise"),
        ({"sampler": FlowSDE(4)}, {}, "the sampler does not fit the model: FlowSDE needs a rectified-flow model"),
        ({"samples_per_prompt": 1}, {}, "LeaveOneOut compares samples.*set samples_per_prompt to 2 or more"),
        (
            {"samples_per_prompt": 1, "objective": PRDP(), "advantage_estimator": PerPromptStatistics()},
            {},
            "PRDP compares samples",
        ),
        ({"model": GaussianModel()}, {}, "no trainable parameters"),
    ],
)
def test_configurations_that_cannot_improve_the_reward_are_rejected(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    module = linear(**options)
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(tmp_path, max_steps=1, **trainer).fit(module, data())
    assert module.reward_queries == 0


class Unused(LinearModel):
    """Its parameter is not used in sampling."""

    def forward(self, x: Tensor, t: float, conditioning: Any) -> Tensor:
        return 0.1 * x


def test_log_probabilities_without_gradient_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the log-probability's gradient reaches none of the trainable"):
        fit(tmp_path, linear(model=Unused(0.1)))
    with pytest.raises(
        ConfigurationError, match="trainable parameters have dtype bfloat16, in which small updates round"
    ):
        fit(tmp_path, make(tiny_sd), precision="bf16-true")


def test_accumulating_over_several_rollouts_is_on_policy(tmp_path: Path) -> None:
    module = linear(objective=Reinforce(), timesteps_per_minibatch=1)
    fit(tmp_path, module, steps=2, accumulate_grad_batches=6)
    assert module.reward_queries == 2 * 2 * 4


def test_second_fit_collects_new_rollouts(tmp_path: Path) -> None:
    module = linear(inner_epochs=2)
    fit(tmp_path, module)
    fit(tmp_path, module)
    assert module.reward_queries == 2 * 4


def test_an_optimizer_step_within_an_on_policy_rollout_is_an_error(tmp_path: Path) -> None:
    """Lightning makes such a step at the end of an epoch that was limited."""
    module = linear(objective=Reinforce(), timesteps_per_minibatch=1)
    with pytest.raises(
        ConfigurationError, match="before all minibatches of a rollout were used, and Reinforce is on-policy; leave out"
    ):
        fit(tmp_path, module, steps=4, accumulate_grad_batches=3, limit_train_batches=2)


def test_a_loader_that_changes_prompts_within_a_rollout_is_an_error(tmp_path: Path) -> None:
    module = linear(inner_epochs=2)
    loader = torch.utils.data.DataLoader(PROMPTS, batch_size=2, collate_fn=list)
    with pytest.raises(ConfigurationError, match="for 2 training steps, and the prompts changed before"):
        trainer_of(tmp_path, max_steps=2).fit(module, loader)


def test_batches_of_a_user_loader_are_checked(tmp_path: Path) -> None:
    module = linear(objective=PRDP(), timesteps_per_minibatch=1)
    with pytest.raises(ConfigurationError, match="PRDP couples .*set trainer.accumulate_grad_batches to 3"):
        trainer_of(tmp_path, max_steps=1).fit(module, [PROMPTS[:2]] * 3)
    assert module.reward_queries == 0


def test_non_finite_scores_are_an_error() -> None:
    class Broken(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().forward(images, prompts).log() * float("nan")

    with pytest.raises(ValueError, match="Broken gave a score that is not finite .* for the prompts 'a red cat', "):
        linear(reward=Broken()).collect_rollout(PROMPTS[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be at least 1"),
        ({"inner_epochs": 0}, "inner_epochs=0 must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"timesteps_per_minibatch": 0}, "timesteps_per_minibatch=0 must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be at least 0"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        linear(**options)


def test_trained_steps_are_those_that_add_noise() -> None:
    assert stochastic_steps(DDIM(4, eta=1.0), scaled_linear()) == [0, 1, 2]
    assert stochastic_steps(DDIM(3, eta=0.5), MILD) == [0, 1, 2]
    assert stochastic_steps(FlowSDE(3), RectifiedFlow()) == [0, 1]

    class Remembering(DDIM):
        def step(self, *arguments: Any) -> Any:
            return super().step(*arguments)[0], "something"

    with pytest.raises(ConfigurationError, match="Remembering is a multistep solver, which policy gradients do not"):
        stochastic_steps(Remembering(4, eta=1.0), scaled_linear())


def test_rectified_flow_with_flow_sde_raises_the_reward(tmp_path: Path) -> None:
    model = LinearModel(0.1, prediction="flow", schedule=RectifiedFlow())
    recorder = fit(
        tmp_path, linear(model=model, sampler=FlowSDE(4), advantage_estimator=GroupRelative(divide_by_std=True))
    )
    assert recorder.of("train/ratio") == [1]
    assert recorder.gradients[0].abs() > 0
