"""Rewards of clean latents: no decoding in training, exact gradients, and sums with rewards of images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_draft.callbacks.lora_header import describe
from lightning_draft.diversity import DiversityAware
from lightning_draft.errors import ConfigurationError
from lightning_draft.guide.best_of_n import best_of_n
from lightning_draft.guide.latent_score import latent_score
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.rewards import (
    Augmented,
    Brightness,
    GradientNormSum,
    LatentNetwork,
    LatentReward,
    Reward,
    Samples,
    WeightedReward,
    WeightedSum,
    ZScoreSum,
)
from lightning_draft.samplers import DDIM
from lightning_draft.scoring import score_folder
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import Full
from tests.tiny_draft import trainer_of
from tests.tiny_runs import PROMPTS, data

SHAPE = (4, 2, 2)
STEPS, THETA = 3, 0.2


class Decodes(LinearModel):
    """Four latent channels, of which images are twice the first three; counts the samples that are decoded."""

    def __init__(self) -> None:
        super().__init__(THETA, shape=SHAPE)
        self.decoded = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded += len(latents)
        return 2 * latents[:, :3]


class Norm(LatentReward):
    """`-scale mean z^2`."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return -self.scale * latents.square().flatten(1).mean(1)


class MeanPixel(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)


def network(seed: int = 0, outputs: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, outputs))


def weighted(**rewards: tuple[Reward, float]) -> dict[str, WeightedReward]:
    return {name: WeightedReward(*each) for name, each in rewards.items()}


def latents(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "draft": (DraftModule, {"truncation": Full(), "micro_batch_size": 1}),
    "gradient matching": (GradientMatchingModule, {}),
    "policy gradient": (PolicyGradientModule, {"samples_per_prompt": 2}),
    "forward process": (ForwardProcessModule, {"samples_per_prompt": 2}),
}
REWARDS: dict[str, Callable[[], Reward]] = {
    "one": Norm,
    "sum": lambda: ZScoreSum(weighted(a=(Norm(), 1.0), b=(LatentNetwork(network()), -2.0))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", REWARDS)
def test_training_does_not_decode(method: str, reward: str, tmp_path: Path) -> None:
    """Including the checks before the first step and the calibration of the sum."""
    kind, options = METHODS[method]
    module = kind(Decodes(), REWARDS[reward](), DDIM(STEPS, eta=1.0), **options)
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, data())
    assert module.model.decoded == 0
    assert module.model.theta.item() != THETA
    assert "train/reward" in trainer.callback_metrics
    assert "train/out_of_range_fraction" not in trainer.callback_metrics


def test_images_are_decoded_once_for_advantages_that_compare_them() -> None:
    for reward, estimator, count in (
        (Norm(), DiversityAware(), 4),
        (MeanPixel(), DiversityAware(), 4),
        (Norm(), None, 0),
    ):
        options = {"advantage_estimator": estimator, "samples_per_prompt": 2, "micro_batch_size": 3}
        module = PolicyGradientModule(Decodes(), reward, DDIM(STEPS, eta=1.0), **options)
        rollout = module.collect_rollout(PROMPTS[:2])
        assert module.model.decoded == count
        if estimator is not None:
            images = (2 * rollout.latents[-1][:, :3]).clamp(0, 1)
            torch.testing.assert_close(rollout.advantages, estimator.from_features(rollout.rewards, images, 2))


def chain_by_hand(x: Tensor, theta: Tensor, model: LinearModel) -> Tensor:
    """DDIM's steps of `eps = theta x`, written out."""
    for t, s in DDIM(STEPS).grid(model.schedule):
        (alpha, sigma), (after, noise) = model.schedule.coefficients(t), model.schedule.coefficients(s)
        eps = theta * x
        x = after * (x - sigma * eps) / alpha + noise * eps
    return x


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_gradient_equals_differentiation_by_hand(micro_batch_size: int | None) -> None:
    model, scorer = Decodes(), network().double()
    module = DraftModule(model, LatentNetwork(scorer), DDIM(STEPS), Full(), micro_batch_size=micro_batch_size)
    z = Full()(module.chain(PROMPTS[:2]), latents())
    found = torch.autograd.grad(module.rewards(z, PROMPTS[:2]).scores.sum(), model.theta)[0]
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(scorer(chain_by_hand(latents(), theta, model)).sum(), theta)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert model.decoded == 0


def test_sum_with_a_reward_of_images_decodes_each_sample_once() -> None:
    model = Decodes()
    reward = WeightedSum(weighted(norm=(Norm(), 0.5), pixel=(MeanPixel(), 3.0)))
    module = DraftModule(model, reward, DDIM(STEPS), Full(), micro_batch_size=2)
    rewards = module.rewards(Full()(module.chain(PROMPTS[:2]), latents()), PROMPTS[:2])
    assert model.decoded == 2
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    z = chain_by_hand(latents(), theta, model)
    scores = {"norm": -z.square().flatten(1).mean(1), "pixel": 2 * z[:, :3].flatten(1).mean(1)}
    expected = 0.5 * scores["norm"] + 3.0 * scores["pixel"]
    torch.testing.assert_close(rewards.scores.double(), expected, rtol=1e-6, atol=1e-7)
    for name, score in scores.items():
        torch.testing.assert_close(rewards.components[name].double(), score, rtol=1e-6, atol=1e-7)
    found, by_hand = (
        torch.autograd.grad(total.sum(), parameter)[0]
        for total, parameter in ((rewards.scores, model.theta), (expected, theta))
    )
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=0)
    assert set(rewards.pixels) == {"train/out_of_range_fraction"}


def test_gradient_norms_of_latent_rewards_are_made_equal() -> None:
    first, second = Norm(50.0), LatentNetwork(network().double())
    z = latents().requires_grad_()
    total = GradientNormSum(weighted(a=(first, 1.0), b=(second, -2.0)))(Samples(z), PROMPTS[:2])
    (found,) = torch.autograd.grad(total.sum(), z)
    each = [torch.autograd.grad(reward(Samples(z), PROMPTS[:2]).sum(), z)[0] for reward in (first, second)]
    norms = [gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for gradient in each]
    common = (norms[0] + norms[1]) / 2
    torch.testing.assert_close(found, common * (each[0] / norms[0] - 2 * each[1] / norms[1]))


def test_validation_scores_the_latents_of_the_images_that_it_keeps(tmp_path: Path) -> None:
    module = DraftModule(Decodes(), Norm(), DDIM(STEPS), eval_rewards={"pixel": MeanPixel()}, seed=3)
    samples = module.generate(PROMPTS[:2], seed=5)
    scores = module.score(samples, PROMPTS[:2])
    torch.testing.assert_close(scores["reward"], -samples.latents.square().flatten(1).mean(1))
    torch.testing.assert_close(scores["pixel"], (2 * samples.latents[:, :3]).clamp(0, 1).flatten(1).mean(1))
    assert torch.equal(samples.images, 2 * module.generate_latents(PROMPTS[:2], seed=5)[:, :3])
    trainer = trainer_of(tmp_path, limit_val_batches=1)
    (metrics,) = trainer.validate(module, data(), verbose=False)
    assert metrics["val/reward"] < 0
    assert metrics["val/gain"] == 0
    assert module.validation.images["base"].shape == (2, 3, 2, 2)


def test_inference_time_methods_do_not_decode_for_a_reward_of_latents() -> None:
    model = Decodes()
    module = DraftModule(model, Norm(), DDIM(STEPS))
    score = latent_score(model, Norm(), PROMPTS[:2])
    noise = latents(dtype=torch.float32)
    torch.manual_seed(0)
    best, first = (
        best_of_n(module.chain(PROMPTS[:2]), noise, score, n=4),
        best_of_n(module.chain(PROMPTS[:2]), noise, score, n=1),
    )
    assert (score(best) >= score(first)).all()
    assert not torch.equal(best, first)
    assert model.decoded == 0


def test_weights_of_a_network_are_read_from_a_file(tmp_path: Path) -> None:
    trained, z = network(seed=1), Samples(latents(dtype=torch.float32))
    save_file(trained.state_dict(), tmp_path / "scorer.safetensors")
    reward = LatentNetwork(network(seed=2), weights=str(tmp_path / "scorer.safetensors"))
    assert torch.equal(reward(z, PROMPTS[:2]), trained(z.latents).squeeze(1))
    assert describe(reward) == "LatentNetwork(weights='scorer.safetensors')"
    with pytest.raises(ConfigurationError, match=r"scorer.safetensors does not fit: 3.weight has shape \(1, 12\)"):
        LatentNetwork(network(outputs=2), weights=str(tmp_path / "scorer.safetensors"))
    with pytest.raises(ConfigurationError, match=r"LatentNetwork.forward returned shape \(2, 2\) for 2 images"):
        LatentNetwork(network(outputs=2))(z, PROMPTS[:2])


def image_file(folder: Path) -> Path:
    Image.new("RGB", (4, 4)).save(folder / "a cat.png")
    return folder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda folder: score_folder(image_file(folder), {"norm": Norm()}, prompts="names"),
            "reward 'norm': Norm scores the latents that a diffusion model samples, and existing images have none; "
            "choose a reward of images",
        ),
        (lambda _: Norm()(torch.rand(2, 3, 4, 4), PROMPTS[:2]), "Norm scores the latents"),
        (
            lambda _: WeightedSum(weighted(norm=(Norm(), 1.0)))(torch.rand(2, 3, 4, 4), PROMPTS[:2]),
            "reward 'norm': Norm scores the latents",
        ),
        (lambda _: Augmented(Norm()), "Augmented needs a reward of images, and reward=Norm scores latents"),
        (
            lambda _: GradientNormSum(weighted(a=(Norm(), 1.0), b=(Brightness(), 1.0))),
            "some of its rewards score images and others latents; write WeightedSum or ZScoreSum",
        ),
    ],
)
def test_a_reward_of_latents_is_rejected_where_there_are_none(
    call: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call(tmp_path)
    assert not (tmp_path / "scores.csv").exists()


class Detached(LatentReward):
    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return latents.detach().mean((1, 2, 3))


class Rounded(LatentReward):
    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return latents.round().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Detached(), "the reward Detached returned a score without a gradient"),
        (Rounded(), "the gradient of the reward Rounded with respect to the latents is exactly zero"),
    ],
)
def test_a_missing_gradient_is_found_before_the_first_step(reward: Reward, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DraftModule(Decodes(), reward, DDIM(STEPS), Full()).check_first_step(PROMPTS[:1])
