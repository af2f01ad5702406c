"""The cosine between gradients of rewards equals hand computation, is logged, and does not change training."""

import pytest
import torch

from lightning_draft.callbacks import RewardConflict
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Brightness, ColorBalance, JPEGSize, Sharpness, WeightedReward, WeightedSum
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import RandomK


def summed(**parts):
    return WeightedSum({name: WeightedReward(*part) for name, part in parts.items()})


def logged(logger):
    return {step: metrics for step, metrics in logger.of("conflict/")}


def test_equal_rewards_have_cosine_1_and_opposite_rewards_cosine_minus_1(make_module, make_trainer, data, logger):
    reward = summed(up=(LinearReward(2.0),), down=(LinearReward(-3.0), 0.1), off=(LinearReward(), 0.0))
    module = make_module(reward=reward, eval_rewards={"less": LinearReward(-1.0), "size": JPEGSize()})
    make_trainer(RewardConflict(every_n_steps=2), logger=logger, max_steps=4).fit(module, data)
    assert list(logged(logger)) == [2, 4]
    metrics = logged(logger)[4]
    assert metrics["conflict/cosine/up/down"] == pytest.approx(-1)
    assert metrics["conflict/cosine/down/eval_rewards.less"] == pytest.approx(1)
    assert metrics["conflict/norm/up"] == pytest.approx(2 / 48**0.5)
    assert metrics["conflict/norm/down"] == pytest.approx(3 / 48**0.5)
    assert not any("off" in name or "size" in name for name in metrics)


def test_a_negative_weight_negates_the_gradient(make_module, make_trainer, data, logger):
    module = make_module(reward=summed(up=(LinearReward(),), down=(LinearReward(), -0.5)))
    make_trainer(RewardConflict(1), logger=logger, max_steps=1).fit(module, data)
    assert logged(logger)[1]["conflict/cosine/up/down"] == pytest.approx(-1)


def test_cosine_is_the_mean_over_the_images_of_the_batch(make_module, make_trainer, data, logger):
    module = make_module(
        reward=Brightness(0.2), eval_rewards={"red": ColorBalance(), "sharp": Sharpness()}, sampler=DDIM(4)
    )
    make_trainer(RewardConflict(2, seed=3), logger=logger, max_steps=2).fit(module, data)
    images = module.generate(["a", "b"], seed=3).images.requires_grad_()
    rewards = {"reward": Brightness(0.2), "eval_rewards.red": ColorBalance(), "eval_rewards.sharp": Sharpness()}
    found = {
        name: torch.autograd.grad(reward(images, ["", ""]).sum(), images)[0].flatten(1)
        for name, reward in rewards.items()
    }
    metrics = logged(logger)[2]
    for one, other in (
        ("reward", "eval_rewards.red"),
        ("reward", "eval_rewards.sharp"),
        ("eval_rewards.red", "eval_rewards.sharp"),
    ):
        expected = torch.cosine_similarity(found[one], found[other]).mean().item()
        assert metrics[f"conflict/cosine/{one}/{other}"] == pytest.approx(expected, abs=1e-6)
    assert len(metrics) == 6


def test_training_with_the_callback_equals_training_without(make_diffusion_module, make_trainer, data):
    def train(*callbacks):
        torch.manual_seed(0)
        reward = summed(dark=(Brightness(0.0),), red=(ColorBalance(),))
        module = make_diffusion_module(reward=reward, truncation=RandomK(), sampler=DDIM(3, eta=1.0))
        make_trainer(*callbacks, max_steps=2, limit_val_batches=0).fit(module, data)
        return module, torch.rand(()).item()

    (watched, numbers), (plain, other) = train(RewardConflict(1)), train()
    assert numbers == other
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in watched.state_dict().items())


def test_single_reward_is_rejected(make_module, make_trainer, data):
    with pytest.raises(ConfigurationError, match="the module has only reward; train on a WeightedSum, or add rewards"):
        make_trainer(RewardConflict()).fit(make_module(model=LinearModel(), eval_rewards={"size": JPEGSize()}), data)
    with pytest.raises(ConfigurationError, match="every_n_steps=0 must be at least 1"):
        RewardConflict(0)
