"""Training with DRaFT: what changes, what is evaluated, the loss, and mixed precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Hinge
from lightning_draft.models import Guidance
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.color import Brightness, ColorBalance
from lightning_draft.rewards.combine import WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full, LastK, LowVariance
from tests.tiny_draft import Recorder, linear, make, stir, trainer_of
from tests.tiny_runs import PROMPTS, data, values


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
    with pytest.raises(ConfigurationError, match=r"images are uint8; .* write images.float\(\) / 255"):
        module.score((255 * images.clamp(0, 1)).byte(), PROMPTS[:3])
    rewards = module.rewards(images, PROMPTS[:3])
    assert rewards.scores.tolist() == pytest.approx([-1, 0.3, 4])
    assert rewards.pixels["train/out_of_range_fraction"].tolist() == [1, 0, 1]


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
