"""Options that make steps without gradient cheaper: merged adapters, and guidance on an interval of the steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.models.lora import layers
from lightning_draft.rewards import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK
from tests.tiny_policy_gradients import trainer_of
from tests.tiny_runs import data

PROMPTS = ["a red cat", "dog"]
STEPS = 4


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def chain_of(folder: Path, guidance: Guidance, **options: Any) -> SamplingChain:
    """A chain of a model whose adapters have random values."""
    lora = LoRA(3, alpha=6.0, target_modules=["to_q", "conv_out"], seed=0, **options)
    model = StableDiffusion(str(folder), lora=lora, guidance=guidance)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return SamplingChain(model, DDIM(STEPS, spacing="trailing"), model.encode(PROMPTS))


@pytest.mark.parametrize(("interval", "steps"), [((0.0, 0.5), [0, 1]), ((0.25, 0.75), [1, 2])], ids=str)
def test_guidance_on_an_interval_equals_steps_with_and_without_guidance(
    tiny_sd: Path, interval: tuple[float, float], steps: list[int]
) -> None:
    chain = chain_of(tiny_sd, Guidance(4.0, interval=interval))
    guided, plain = chain_of(tiny_sd, Guidance(4.0)), chain_of(tiny_sd, Guidance(1.0))
    state = guided.start(noise())
    for step in range(STEPS):
        state = (guided if step in steps else plain).advance(state, 1)
    assert torch.equal(chain.advance(chain.start(noise())).x, state.x)
    assert not torch.allclose(guided.advance(guided.start(noise())).x, state.x, atol=1e-3)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.5), (0.8, 0.2)])
def test_an_interval_that_is_empty_or_out_of_range_is_rejected(interval: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance.interval=.* must be two increasing .*write \[0, 0.5\]"):
        Guidance(interval=interval)


def test_an_interval_without_effect_is_reported(tiny_sd: Path, tmp_path: Path) -> None:
    Guidance(3.0, interval=(0.05, 0.15)).check_interval(10)
    Guidance(1.0, interval=(0.05, 0.09)).check_interval(10)
    with pytest.raises(ConfigurationError, match=r"interval=\[0.05, 0.09\] contains none of the 10 sampling steps"):
        Guidance(3.0, interval=(0.05, 0.09)).check_interval(10)
    with pytest.warns(UserWarning, match=r"guidance.interval=\[0.0, 0.5\] has no effect, because guidance.scale=1"):
        StableDiffusion(str(tiny_sd), guidance=Guidance(1.0, interval=(0.0, 0.5)))
    module = DraftModule(
        StableDiffusion(str(tiny_sd), lora=LoRA(2), guidance=Guidance(3.0, interval=(0.1, 0.3))), ColorTarget(), DDIM(3)
    )
    with pytest.raises(ConfigurationError, match="contains none of the 3 sampling steps"):
        trainer_of(tmp_path, max_steps=1).fit(module, data())


def test_merged_adapters_give_the_same_sample_and_gradient_to_rounding_and_leave_the_weights_unchanged(
    tiny_sd: Path,
) -> None:
    results = []
    for merge in (False, True):
        chain = chain_of(tiny_sd, Guidance(2.0), merge=merge)
        before = {name: value.clone() for name, value in chain.model.named_parameters()}
        sample = LastK(1)(chain, noise())
        parameters = [value for _, value in chain.model.trainable_parameters()]
        gradients = torch.autograd.grad(sample.square().sum(), parameters)
        assert all(torch.equal(value, before[name]) for name, value in chain.model.named_parameters())
        results.append((sample.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    (sample, gradient), (merged_sample, merged_gradient) = results
    assert not torch.equal(sample, merged_sample)  # so that the merged weights are in use
    torch.testing.assert_close(merged_sample, sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged_gradient, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_disabled_adapters_are_not_merged(tiny_sd: Path) -> None:
    samples = []
    for merge in (False, True):
        chain = chain_of(tiny_sd, Guidance(1.0), merge=merge)
        with torch.no_grad(), chain.model.base():
            samples.append(chain.advance(chain.start(noise())).x)
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    "convert",
    [lambda weight: torch.zeros_like(weight, dtype=torch.int8), lambda weight: TwoTensor(weight, weight.clone())],
    ids=["integers", "a tensor subclass that reports float32, as those of torchao"],
)
def test_weights_that_cannot_be_merged_are_rejected_and_unchanged(convert: Any, tiny_sd: Path) -> None:
    chain = chain_of(tiny_sd, Guidance(1.0), merge=True)
    layer = layers(chain.model.denoiser)[-1].get_base_layer()
    layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)
    first = layers(chain.model.denoiser)[0].get_base_layer().weight
    before = first.clone()
    with torch.no_grad(), pytest.raises(ConfigurationError, match=r"quantized or sharded .*write lora.merge: false"):
        chain.advance(chain.start(noise()))
    assert torch.equal(first, before)


def test_merging_is_rejected_for_weights_that_are_sharded(tiny_sd: Path) -> None:
    """When they are, before training; FSDP replaces them by flat tensors, and FSDP2 by subclasses."""
    with pytest.raises(ConfigurationError, match=r"sharded over processes; write lora.merge: false"):
        chain_of(tiny_sd, Guidance(1.0), merge=True).model.on_sharded()
    chain_of(tiny_sd, Guidance(1.0), merge=False).model.on_sharded()
