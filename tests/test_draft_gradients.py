"""Gradients of DRaFT do not depend on how they are computed: micro-batches, checkpointing, accumulation."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance
from lightning_draft.recompute import Recompute
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomSteps
from tests.tiny_draft import gradients, linear, make, stir, trainer_of
from tests.tiny_runs import PROMPTS, data


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


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
        ("auto", LastK(1), True, False),
        ("auto", LowVariance(2), True, False),
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
    assert torch.allclose(full.generate(PROMPTS[:2]).images, half.generate(PROMPTS[:2]).images, atol=1e-6)
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
