"""The anchor against a hand-computed denoising error, and its samples against the base model's chain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.anchor import Anchor, BaseSamples, denoising_error
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.models.base import Prediction
from lightning_draft.prompt import NEGATIVE_COLUMN, Prompt
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearModel
from tests.tiny_draft import linear, trainer_of
from tests.tiny_runs import PROMPTS, data


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("seed", range(3))
def test_denoising_error_equals_hand_computation(prediction: Prediction, seed: int) -> None:
    """`u_theta = theta x_t`, and `u` is the noise, `alpha e - sigma x_0` or `e - x_0`."""
    is_flow = prediction == "flow"
    model = LinearModel(0.3, prediction, RectifiedFlow() if is_flow else None)
    generator = torch.Generator().manual_seed(seed)
    sampler = FlowEuler(5) if is_flow else DDIM(5)
    chain = SamplingChain(model, sampler, model.encode(["a", "b"]), generator=generator)
    samples = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.manual_seed(9)
    error = denoising_error(chain, samples)
    torch.manual_seed(9)
    noise, left = torch.randn_like(samples), int(torch.randint(1, 6, (), generator=generator.manual_seed(seed)))
    alpha, sigma = model.schedule.coefficients(chain.grid[5 - left][0])
    x = alpha * samples + sigma * noise
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * samples, "flow": noise - samples}[prediction]
    weight = model.encode(["a", "b"]).tensors["weight"].view(-1, 1, 1, 1)
    residual = 0.3 * weight * x - target
    torch.testing.assert_close(error, residual.square().mean())
    (slope,) = torch.autograd.grad(error, model.theta)
    assert slope.item() == pytest.approx((2 * residual * weight * x).mean().item(), rel=1e-10)


def test_samples_are_those_of_the_base_model_and_generated_once() -> None:
    model = LinearModel(0.1)
    model.theta.data.fill_(0.4)
    samples = BaseSamples(model, DDIM(4), seed=3)
    first = samples(PROMPTS[:2])
    assert model.calls_without_gradient == 2 * 4
    model.theta.data.fill_(0.9)
    again = samples([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert model.calls_without_gradient == 2 * 4
    assert torch.equal(again, first[[1, 0, 1]])
    fresh = BaseSamples(LinearModel(0.1), DDIM(4), seed=3)
    assert torch.equal(fresh(PROMPTS[1:2]), first[1:])
    assert not torch.equal(BaseSamples(model, DDIM(4), seed=4)(PROMPTS[:2]), first)


def test_samples_depend_on_the_negative_prompt_of_their_prompt(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), guidance=Guidance(3.0))
    plain, own = Prompt("a cat"), Prompt("a cat", {NEGATIVE_COLUMN: "a red dog"})
    found = BaseSamples(model, DDIM(2), seed=3)([plain, own, plain])
    for prompt, sample in zip((plain, own, plain), found, strict=True):
        assert torch.equal(BaseSamples(model, DDIM(2), seed=3)([prompt])[0], sample)
    assert not torch.allclose(found[0], found[1])


def test_samples_are_generated_again_for_another_sampler(tmp_path: Path) -> None:
    """In a second `fit`, as the scores of the base model are."""
    module = linear(anchor=Anchor(0.5))
    for sampler in (DDIM(4), DDIM(7)):
        module.sampler = sampler
        trainer_of(tmp_path, max_steps=1).fit(module, data())
        expected = BaseSamples(module.model, sampler, module.seed)(PROMPTS[:2])
        assert torch.equal(module.base_samples(PROMPTS[:2]), expected)


def test_penalty_is_added_to_the_loss() -> None:
    found = []
    for options in ({}, {"anchor": Anchor(0.7)}):
        module = linear(**options)
        torch.manual_seed(2)
        found.append(module.loss_and_logs(PROMPTS[:2], torch.Generator().manual_seed(0)))
    (plain, _), (loss, logs) = found
    assert logs["train/reward_loss"].item() == plain.item()
    assert logs["train/anchor_error"] > 0
    assert loss.item() == pytest.approx(plain.item() + 0.7 * logs["train/anchor_error"].item())
    assert logs["train/loss"].item() == loss.item()


def test_penalty_costs_one_call_with_gradient() -> None:
    module = linear(anchor=Anchor(), checkpointing="none")
    module.loss_and_logs(PROMPTS[:2], torch.Generator().manual_seed(0))
    before = module.model.calls_with_gradient, module.model.calls_without_gradient
    module.loss_and_logs(PROMPTS[:2], torch.Generator().manual_seed(0))
    steps = module.sampler.num_steps
    gradient_steps = module.truncation.gradient_steps(steps)
    assert module.model.calls_with_gradient - before[0] == gradient_steps + 1
    assert module.model.calls_without_gradient - before[1] == steps - gradient_steps


@pytest.mark.parametrize("start", [0.6, -0.6])
def test_large_weight_moves_the_model_towards_the_minimum_of_the_error(start: float, tmp_path: Path) -> None:
    """From both sides of the minimum, whatever the direction that increases the reward."""
    module = linear(anchor=Anchor(1e4))
    module.model.theta.data.fill_(start)
    torch.manual_seed(0)
    chain = module.chain(PROMPTS * 200, torch.Generator().manual_seed(0))
    samples = BaseSamples(module.model, module.sampler, 0)(PROMPTS * 200)
    weights, products, squares = chain.conditioning.tensors["weight"].view(-1, 1, 1, 1), [], []
    for left in range(1, chain.num_steps + 1):
        noise = torch.randn_like(samples)
        x = weights * chain.renoise(samples, left, noise).x
        products.append((x * noise).mean())
        squares.append(x.square().mean())
    minimum = (sum(products) / sum(squares)).item()
    assert abs(minimum - start) > 0.2
    trainer_of(tmp_path, max_steps=15).fit(module, data())
    assert abs(module.model.theta.item() - minimum) < abs(start - minimum) - 0.1


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """The samples are generated again, in another order."""

    def run(**options: Any) -> float:
        module = linear(anchor=Anchor(0.5), sampler=DDIM(4, eta=1.0))
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer_of(tmp_path, saving, max_steps=5, enable_checkpointing=True).fit(module, data(), **options)
        return module.model.theta.item()

    straight = run()
    assert run(ckpt_path=str(tmp_path / "step=3.ckpt")) == straight


def test_weight_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="anchor.weight=0.0 must be a positive number"):
        Anchor(0.0)
