"""Training a small pipeline with `DraftModule`: parameters, gradients, random states, checkpoints, processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_draft.chain import Recompute
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Hinge
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.color import Brightness, ColorBalance
from lightning_draft.rewards.combine import WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM, Transition
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomSteps

TARGETS = ["to_v", "conv_out"]
PROMPTS = ["a red cat", "a cat", "red", "cat dog", "tree", "a dog"]


def make(folder: Path, *, model: dict[str, Any] | None = None, **options: Any) -> DraftModule:
    """DRaFT-1 towards red for a pipeline with reproducible, large initial adapters."""
    settings = {"guidance": Guidance(1.0), "lora": LoRA(4, alpha=8.0, target_modules=TARGETS, seed=0), **(model or {})}
    defaults: dict[str, Any] = {
        "model": StableDiffusion(str(folder), **settings),
        "reward": ColorBalance(),
        "sampler": DDIM(2, spacing="trailing"),
        "truncation": LastK(1),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return DraftModule(**{**defaults, **options})


def linear(**options: Any) -> DraftModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": LinearReward(),
        "sampler": DDIM(4),
        "truncation": Full(),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return DraftModule(**{**defaults, **options})


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
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def gradients(module: DraftModule, prompts: Sequence[str] = PROMPTS[:4], seed: int = 0) -> dict[str, Tensor]:
    """Return the gradients of the loss for one random choice."""
    torch.manual_seed(seed)
    loss, _ = module.loss_and_logs(prompts, torch.Generator().manual_seed(seed))
    parameters = module.trainable_parameters()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def stir(module: DraftModule) -> DraftModule:
    """Set the adapters to random values, so that both factors have a gradient."""
    generator = torch.Generator().manual_seed(3)
    for value in module.trainable_parameters().values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator).to(value)
    return module


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


class Recorder(Callback):
    """Records the logged values of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.steps.append(logged)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


# Learning.


def test_training_changes_only_the_adapters_and_raises_the_reward(tiny_sd: Path, tmp_path: Path) -> None:
    """The gain in validation is 0 before training."""
    parts = WeightedSum({"red": WeightedReward(ColorBalance(), 2.0), "light": WeightedReward(Brightness(), 0.0)})
    module, recorder = make(tiny_sd, reward=parts, eval_rewards={"brightness": Brightness()}), Recorder()
    before, buffers = values(module), {name: value.clone() for name, value in module.named_buffers()}
    trainer = trainer_of(tmp_path, recorder, max_steps=16, limit_val_batches=None)
    (first,) = trainer.validate(module, data(), verbose=False)
    assert first["val/gain"] == 0
    assert first["val/reward"] == pytest.approx(2 * first["val/reward/red"])
    assert first["val/brightness"] == pytest.approx(first["val/reward/light"])

    trainer.fit(module, data())
    after, trained = values(module), module.trainable_parameters().keys()
    assert trained
    assert all("lora_" in name for name in trained)
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in trained), name
    for name, value in module.named_buffers():
        assert torch.equal(value, buffers[name]), name
    rewards = recorder.of("train/reward")
    assert len(rewards) == 16
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05
    assert recorder.of("train/loss") == pytest.approx([-reward for reward in rewards])
    assert recorder.of("train/reward/red") == pytest.approx([reward / 2 for reward in rewards])

    (last,) = trainer.validate(module, data(), verbose=False)
    assert last["val/gain"] == pytest.approx(last["val/reward"] - first["val/reward"], abs=1e-6)
    assert last["val/gain"] > 0.05


def test_rewards_and_frozen_networks_stay_in_eval_mode(tiny_sd: Path) -> None:
    class Noisy(ColorBalance):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.scale = nn.Parameter(torch.ones(()))

    module = make(tiny_sd, reward=Noisy(), eval_rewards={"other": Noisy()}).train()
    assert module.training
    assert module.model.training
    assert not module.model.unet.training
    assert not any(part.training for part in (*module.reward.modules(), *module.eval_rewards.modules()))
    assert not any("scale" in name for name in module.trainable_parameters())


def test_validation_clamps_images_and_training_does_not() -> None:
    class Largest(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.flatten(1).amax(1)

    module = linear(reward=Largest())
    images = torch.tensor([-1.0, 0.3, 4.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert module.score(images, PROMPTS[:3])["reward"].tolist() == pytest.approx([0, 0.3, 1])
    rewards, _, out_of_range = module.rewards(images, PROMPTS[:3])
    assert rewards.tolist() == pytest.approx([-1, 0.3, 4])
    assert out_of_range.tolist() == [1, 0, 1]


# The loss.


@pytest.mark.parametrize("copies", [1, 3])
def test_losses_of_copies_are_added_and_those_of_the_batch_averaged(copies: int) -> None:
    """DRaFT-LV: `-mean_b sum_c r`, with the reward of each copy for its prompt."""

    class Lengths(Reward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    module, prompts = linear(reward=Lengths(), truncation=LowVariance(copies)), ["a", "bbbbb"]
    torch.manual_seed(0)
    loss, logs = module.loss_and_logs(prompts)
    torch.manual_seed(0)
    chain = module.chain(prompts)
    latents = module.truncation(chain, module.model.noise(2))
    rewards = latents.mean((1, 2, 3)).view(1 + copies, 2) * torch.tensor([1.0, 5.0])
    assert loss.item() == pytest.approx(-rewards.sum(0).mean().item())
    assert logs["train/reward"].item() == pytest.approx(rewards[0].mean().item())
    assert not any(value.requires_grad for value in logs.values())


def test_the_loss_map_is_applied_to_each_score() -> None:
    module = linear(loss=Hinge(threshold=0.0, scale=3.0))
    torch.manual_seed(0)
    loss, _ = module.loss_and_logs(PROMPTS)
    torch.manual_seed(0)
    latents = Full()(module.chain(PROMPTS), module.model.noise(len(PROMPTS)))
    assert loss.item() == pytest.approx(3 * (-latents.mean((1, 2, 3))).clamp(min=0).mean().item())


def test_kl_weight_adds_the_prediction_drift_and_reduces_it(tiny_sd: Path, tmp_path: Path) -> None:
    module = stir(make(tiny_sd, kl_weight=0.5, truncation=LastK(2)))
    torch.manual_seed(0)
    loss, logs = module.loss_and_logs(PROMPTS[:2])
    assert logs["train/prediction_drift"] > 0
    assert logs["train/reward_loss"].item() == pytest.approx(-logs["train/reward"].item())
    assert loss.item() == pytest.approx((logs["train/reward_loss"] + 0.5 * logs["train/prediction_drift"]).item())
    assert logs["train/loss"].item() == loss.item()
    module.kl_weight = 0.0
    torch.manual_seed(0)
    plain, logs = module.loss_and_logs(PROMPTS[:2])
    assert not {"train/prediction_drift", "train/reward_loss"} & logs.keys()
    assert plain.item() == pytest.approx(-logs["train/reward"].item())

    def drift(weight: float) -> float:
        module, recorder = make(tiny_sd, kl_weight=weight), Recorder()
        trainer_of(tmp_path, recorder, max_steps=5).fit(module, data())
        assert recorder.of("train/prediction_drift")[0] == 0
        return recorder.of("train/prediction_drift")[-1]

    assert drift(100.0) < 0.3 * drift(1e-6)


def test_gain_is_relative_to_the_current_base_model(tmp_path: Path) -> None:
    """Also after validations with another sampler, other prompts or another batch size."""
    module, trainer = linear(), trainer_of(tmp_path, limit_val_batches=None)
    module.model.theta.data += 0.3
    for sampler, prompts, size in ((DDIM(4), PROMPTS, 2), (DDIM(2), PROMPTS, 2), (DDIM(2), PROMPTS[::-1], 3)):
        module.sampler = sampler
        prompt_data = PromptDataModule(prompts, batch_size=2, val_size=3, val_batch_size=size)
        (found,) = trainer.validate(module, prompt_data, verbose=False)
        fresh = linear(sampler=sampler)
        (base,) = trainer.validate(fresh, prompt_data, verbose=False)
        assert base["val/gain"] == 0
        assert found["val/gain"] == pytest.approx(found["val/reward"] - base["val/reward"], abs=1e-6)


# Gradients do not depend on how they are computed.


@pytest.mark.parametrize("truncation", [LastK(2), LowVariance(2), DRTune(k=2, m=2)], ids=lambda t: type(t).__name__)
def test_micro_batches_and_checkpointing_change_no_gradient(tiny_sd: Path, truncation: Any) -> None:
    model = {"guidance": Guidance(2.0)}
    module = stir(make(tiny_sd, model=model, truncation=truncation, checkpointing="none", kl_weight=0.1)).double()
    expected = gradients(module)
    for checkpointing, size in (("none", 2), ("step", 3)):
        module.checkpointing, module.micro_batch_size = checkpointing, size
        assert_close(gradients(module), expected, 1e-5)  # images and rewards are float32
    module.checkpointing, module.micro_batch_size = "both", 2
    assert_close(gradients(module), expected, 1e-5)


@pytest.mark.parametrize(
    ("checkpointing", "truncation", "steps", "blocks"),
    [
        ("auto", LastK(1), False, False),
        ("auto", LowVariance(2), False, False),
        ("auto", LastK(2), True, False),
        ("auto", RandomSteps(), True, False),
        ("none", Full(), False, False),
        ("step", LastK(1), True, False),
        ("block", LastK(2), False, True),
        ("both", LastK(2), True, True),
    ],
)
def test_recompute_options_follow_checkpointing_and_truncation(
    tiny_sd: Path, checkpointing: Any, truncation: Any, steps: bool, blocks: bool
) -> None:
    module = make(tiny_sd, checkpointing=checkpointing, truncation=truncation)
    assert module.chain(["a cat"]).recompute == Recompute(steps=steps, blocks=blocks)


def test_block_checkpointing_is_that_of_the_module_that_takes_the_step(tiny_sd: Path) -> None:
    """Even if other modules of the same model, direct or policy-gradient, were built or run before."""
    model = make(tiny_sd).model
    modules = [DraftModule(model, ColorBalance(), DDIM(2), checkpointing=mode) for mode in ("block", "none")]
    policies = [PolicyGradientModule(model, ColorBalance(), DDIM(2, eta=1), checkpointing=m) for m in ("block", "none")]
    assert not model.block_checkpointing
    for index in (0, 1, 0):
        for module in (modules[index], policies[index]):
            model.checkpoint_blocks(index == 1)
            module.check_first_step(PROMPTS[:1])
            assert model.block_checkpointing == (index == 0)


def test_a_network_without_blocks_is_rejected_before_the_first_step() -> None:
    policy = PolicyGradientModule(LinearModel(0.1), LinearReward(), DDIM(2, eta=1.0), checkpointing="block")
    for module in (linear(checkpointing="block"), policy):
        with pytest.raises(
            ConfigurationError, match='LinearModel has no blocks to recompute; write checkpointing="step"'
        ):
            module.check_first_step(["a cat"])


def test_micro_batches_bound_the_stored_activations(tiny_sd: Path) -> None:
    """Number of saved elements for the backward pass of four samples, one at a time compared with all at once."""

    def kept(size: int | None) -> int:
        module, elements = make(tiny_sd, checkpointing="none", micro_batch_size=size), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module.loss_and_logs(PROMPTS[:4])
        return elements

    assert kept(1) < 0.1 * kept(None)


def test_guidance_gradient_modes_give_equal_images_and_different_gradients(tiny_sd: Path) -> None:
    full = stir(make(tiny_sd, model={"guidance": Guidance(2.0)}))
    half = stir(make(tiny_sd, model={"guidance": Guidance(2.0, gradient="conditional")}))
    assert torch.allclose(full.generate(PROMPTS[:2]), half.generate(PROMPTS[:2]), atol=1e-6)
    ours, theirs = gradients(full), gradients(half)
    assert any((ours[name] - theirs[name]).norm() > 0.1 * theirs[name].norm() for name in ours)


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """The optimizer receives the mean gradient of the batches, which have different noise."""
    seen: list[float] = []
    found: list[float] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append(pl_module.model.theta.grad.item())

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            found.append(pl_module.model.theta.grad.item())

    def run(accumulate: int) -> None:
        seen.clear()
        found.clear()
        trainer_of(tmp_path, Watch(), max_steps=1, accumulate_grad_batches=accumulate).fit(linear(), data())

    run(1)
    first = seen[0]
    run(2)
    assert seen[0] == pytest.approx(first / 2)
    assert len(seen) == 2
    assert seen[1] - seen[0] != pytest.approx(seen[0], rel=1e-3)
    assert found == seen[1:]


# Random states.


def test_random_state_of_the_caller_is_not_changed(tmp_path: Path) -> None:
    module = linear(truncation=LowVariance(2), sampler=DDIM(4, eta=1.0))
    torch.manual_seed(8)
    before = torch.get_rng_state()
    trainer_of(tmp_path, max_steps=3, limit_val_batches=None).fit(module, data())
    module.generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_step_depends_only_on_seed_and_position(tmp_path: Path) -> None:
    def rewards(seed: int, state: int) -> list[float]:
        recorder = Recorder()
        torch.manual_seed(state)
        module = linear(truncation=RandomSteps(), sampler=DDIM(4, eta=1.0), seed=seed)
        trainer_of(tmp_path, recorder, max_steps=3).fit(module, data())
        return recorder.of("train/reward")

    assert rewards(0, 1) == rewards(0, 2) != rewards(1, 1)
    assert len(set(rewards(0, 1))) == 3


def test_generate_uses_its_seed() -> None:
    module = linear(sampler=DDIM(4, eta=1.0))
    images = module.generate(PROMPTS, seed=5)
    assert torch.equal(module.generate(PROMPTS, seed=5), images)
    assert not torch.equal(module.generate(PROMPTS, seed=6), images)
    assert not torch.equal(module.generate(PROMPTS), images)
    assert not images.requires_grad
    noise = torch.randn(len(PROMPTS), 3, 4, 4)
    assert not torch.equal(module.generate(PROMPTS, noise=noise, seed=5), images)


def test_noise_of_the_steps_differs_from_the_starting_noise() -> None:
    """With a sampler that returns the noise of a step as the latent."""

    class Forgetful(DDIM):
        def step(self, schedule: Any, x: Tensor, *_: Any) -> Any:
            return Transition(torch.zeros_like(x), 1.0), None

    module = linear(sampler=Forgetful(1))
    start = module.model.noise(len(PROMPTS), torch.Generator().manual_seed(5))
    for images in (module.generate(PROMPTS, seed=5), module.generate(PROMPTS, noise=start, seed=5)):
        assert not torch.isclose(images, module.model.decode(start)).any()


# Checkpoints.


@pytest.mark.parametrize(
    ("stop", "pipeline", "options"),
    [
        (2, False, {}),
        (3, True, {"limit_val_batches": None, "val_check_interval": 1}),
        (3, False, {"accumulate_grad_batches": 2}),
    ],
    ids=["at the end of an epoch", "within an epoch, validating", "accumulating"],
)
def test_resumed_run_equals_uninterrupted_run(
    tiny_sd: Path, tmp_path: Path, stop: int, pipeline: bool, options: dict[str, Any]
) -> None:
    """Compared are parameters, optimizer, rewards, and thereby noise, prompts and random choices."""
    settings: dict[str, Any] = {"truncation": RandomSteps(), "sampler": DDIM(2, eta=1.0), "seed": 4}

    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        module = make(tiny_sd, **settings) if pipeline else linear(**settings)
        recorder = Recorder()
        saving = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
        trainer = trainer_of(tmp_path, recorder, *callbacks, max_steps=steps, **{**options, **saving})
        trainer.fit(module, data(), ckpt_path=ckpt)
        return values(module), trainer.optimizers[0].state_dict()["state"], recorder.of("train/reward")

    straight = run(5)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    torch.manual_seed(99)
    resumed = run(5, ckpt=str(tmp_path / f"step={stop}.ckpt"))
    assert [*first[2], *resumed[2]] == straight[2]
    for name, value in straight[0].items():
        assert torch.equal(resumed[0][name], value), name
    for index, moments in straight[1].items():
        for name, value in moments.items():
            assert torch.equal(resumed[1][index][name], value), (index, name)


def test_checkpoint_contains_the_trained_parameters_and_loads_with_weights_only(tiny_sd: Path, tmp_path: Path) -> None:
    module = make(tiny_sd)
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    trained = module.trainable_parameters()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    other = make(tiny_sd, model={"lora": LoRA(rank=4, target_modules=["to_q"])})
    with pytest.raises(ConfigurationError, match="other trainable parameters than this model .*the folder of that run"):
        trainer_of(tmp_path, max_steps=2).fit(other, data(), ckpt_path=str(tmp_path / "run.ckpt"))
    wider = make(tiny_sd, model={"lora": LoRA(rank=6, target_modules=TARGETS)})
    message = r"^the checkpoint's '\S+lora_A\S+' has shape \(4, \d+.*\) and this model's \(6, \d+.*LoRA ranks differ"
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(tmp_path, max_steps=2).fit(wider, data(), ckpt_path=str(tmp_path / "run.ckpt"))


# Precision.


def test_mixed_precision_trains_float32_adapters(tiny_sd: Path, tmp_path: Path) -> None:
    """The gradient equals that of float32 up to rounding, although earlier steps have no graph."""
    found: dict[str, dict[str, Tensor]] = {}

    class Keep(Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            parameters = pl_module.trainable_parameters()
            found[trainer.precision] = {name: value.grad.clone() for name, value in parameters.items()}

    for precision, dtype in (("32-true", "float32"), ("bf16-mixed", "bfloat16")):
        model = {"guidance": Guidance(2.0, gradient="conditional"), "dtype": dtype}
        module = stir(make(tiny_sd, model=model))
        trainer_of(tmp_path, Keep(), max_steps=1, precision=precision).fit(module, data())
        assert {value.dtype for value in module.trainable_parameters().values()} == {torch.float32}
    flat = {name: torch.cat([value.flatten() for value in each.values()]) for name, each in found.items()}
    assert torch.cosine_similarity(flat["32-true"], flat["bf16-mixed"], dim=0) > 0.98


def test_mixed_precision_raises_the_reward(tiny_sd_v: Path, tmp_path: Path) -> None:
    module, recorder = make(tiny_sd_v, model={"dtype": "bfloat16"}), Recorder()
    trainer_of(tmp_path, recorder, max_steps=8, precision="bf16-mixed").fit(module, data())
    rewards = recorder.of("train/reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.03


# Several processes.


class Note(Callback):
    """Records the random choices and the final parameters of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        model, self.noise, self.calls = pl_module.model, [], []
        sample_noise = model.noise

        def recorded_noise(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
            self.noise.append(sample_noise(batch_size, generator))
            return self.noise[-1]

        model.noise = recorded_noise

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.model.calls_with_gradient = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.calls.append(pl_module.model.calls_with_gradient)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        del pl_module.model.noise
        notes = {"noise": torch.cat(self.noise), "calls": self.calls, "theta": pl_module.model.theta.detach()}
        torch.save(notes, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_share_random_choices_and_parameters_but_not_noise(tmp_path: Path) -> None:
    """The update is that of the mean of their gradients."""

    def module() -> DraftModule:
        return linear(
            truncation=RandomSteps(),
            checkpointing="none",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )

    options = {"strategy": "ddp_fork", "devices": 2, "limit_val_batches": None}
    trainer_of(tmp_path, Note(tmp_path), max_steps=4, **options).fit(module(), data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["calls"] == two["calls"]
    assert len(set(one["calls"])) > 1
    assert torch.equal(one["theta"], two["theta"])
    assert not torch.isclose(one["noise"], two["noise"]).any()

    trainer_of(tmp_path, Note(tmp_path), max_steps=1, **options).fit(module(), data())
    slopes = []
    for notes in (one, two):
        alone = module()
        chain = alone.chain(["a"] * 2, torch.Generator().manual_seed(derive_seed(0, 0)))
        latents = alone.truncation(chain, notes["noise"][:2])
        slopes.append(torch.autograd.grad(-latents.mean((1, 2, 3)).mean(), alone.model.theta)[0])
    after = torch.load(tmp_path / "0.pt")["theta"]
    assert after.item() == pytest.approx((0.1 - 0.1 * torch.stack(slopes).mean()).item(), rel=1e-6)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(values(pl_module), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_have_equal_parameters_after_training_a_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    """With recomputed steps and micro-batches."""
    module = make(tiny_sd, truncation=LastK(2), micro_batch_size=1)
    before = values(module)
    options = {"strategy": "ddp_fork", "devices": 2}
    trainer_of(tmp_path, Save(tmp_path), max_steps=2, **options).fit(module, data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(two[name], value), name
        assert torch.equal(before[name], value) != ("lora_" in name), name


# Settings.


def test_optimizer_and_schedule_receive_only_the_adapters(tiny_sd: Path, tmp_path: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module = make(tiny_sd, lr_scheduler=scheduler)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(module, data())
    (group,) = trainer.optimizers[0].param_groups
    assert {id(value) for value in group["params"]} == {id(value) for value in module.trainable_parameters().values()}
    assert group["lr"] == pytest.approx(1e-2 * 0.5**3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be at least 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        (
            {"checkpointing": "steps"},
            "checkpointing='steps' is not a valid choice; write one of auto, none, step, block, both",
        ),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**options)


@pytest.mark.parametrize("name", ["training", "type", "parameters"])
def test_evaluation_reward_can_have_the_name_of_a_module_attribute(name: str, tiny_sd: Path) -> None:
    module = DraftModule(
        StableDiffusion(str(tiny_sd), guidance=Guidance(1.0)), Brightness(), DDIM(2), eval_rewards={name: Brightness()}
    )
    scores = module.score(torch.rand(2, 3, 16, 16), ["a cat", "a dog"])
    torch.testing.assert_close(scores[name], scores["reward"])


class Listed(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return list(images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    "options", [{"reward": Listed()}, {"eval_rewards": {"odd": Listed()}}], ids=["trained", "eval"]
)
def test_validation_scores_must_have_one_value_per_image(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^Listed.forward returned a list for 2 images; return a tensor of"):
        linear(**options).score(torch.rand(2, 3, 4, 4), ["a cat", "a dog"])


@pytest.mark.parametrize("name", ["a.b", "reward", ""])
def test_evaluation_reward_with_the_name_of_a_log_key_is_rejected(name: str, tiny_sd: Path) -> None:
    with pytest.raises(ConfigurationError, match="reward"):
        DraftModule(StableDiffusion(str(tiny_sd)), Brightness(), eval_rewards={name: Brightness()})
