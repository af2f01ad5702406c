"""Gradients of Stable Diffusion 3: finite differences, guidance by hand, and checkpointing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models import (
    Guidance,
    StableDiffusion3,
)
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import FlowEuler
from lightning_draft.truncation import Full, LastK
from tests.tiny_stable_diffusion_3 import PROMPTS, edited, noise, opened, stirred


def gradients(model: StableDiffusion3, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient in every trainable parameter."""
    names, values = zip(*model.trainable_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    """Assert equal names, and values that are equal relative to the norm of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


@pytest.fixture(scope="module")
def exact(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Remove the norms of queries and keys, which diffusers computes in float32 for any dtype."""
    return edited(tiny_sd3, tmp_path_factory.mktemp("sd3") / "exact", "transformer/config.json", qk_norm=None)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_gradients_equal_finite_differences(exact: Path, guidance_scale: float) -> None:
    """Through all steps and the decoder, for both attentions of the image and that of the text."""
    model = stirred(exact, guidance=Guidance(guidance_scale)).double()
    conditioning, start = model.encode(PROMPTS), noise(dtype=torch.float64)

    def loss() -> Tensor:
        return model.decode(Full()(SamplingChain(model, FlowEuler(3), conditioning), start)).square().sum()

    found = gradients(model, loss())
    parameters = dict(model.trainable_parameters())
    for layer in ("0.attn.to_q", "0.attn2.to_v", "0.attn.add_k_proj", "0.attn.to_add_out", "1.attn.to_out.0"):
        for factor in ("lora_A", "lora_B"):
            name = f"transformer.transformer_blocks.{layer}.{factor}.default.weight"
            value = parameters[name]
            direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            values = []
            with torch.no_grad():
                for step in (1e-4, -1e-4):
                    value += step * direction
                    values.append(loss())
                    value -= step * direction
            slope = (found[name] * direction).sum()
            torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-8)
            assert slope.abs() > 1e-6, name


def test_guidance_gradients_equal_hand_computation(exact: Path) -> None:
    """`v_u + w (v_c - v_u)`: weights `w` and `1 - w` in full, `w` and 0 in conditional."""
    w, x = 3.0, noise(dtype=torch.float64)
    model = stirred(exact, guidance=Guidance(w, "tree")).double()
    both = model.encode(PROMPTS)
    assert both.negative is not None
    time = torch.full((2,), 500.0)

    def slope(text: Tensor, pooled: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        output = model.transformer(x, text.double(), pooled.double(), time, return_dict=False)[0]
        return gradients(model, (output * cotangent).sum())

    output = model(x, 0.5, model.encode(PROMPTS))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = slope(*both.tensors.values(), cotangent)
    negative = slope(*both.negative.tensors.values(), cotangent)
    full = {name: w * given[name] + (1 - w) * negative[name] for name in given}
    assert_close(gradients(model, (output * cotangent).sum()), full, 1e-9)
    model.guidance = replace(model.guidance, gradient="conditional")
    again = model(x, 0.5, model.encode(PROMPTS))
    torch.testing.assert_close(again, output)
    half = {name: w * value for name, value in given.items()}
    assert_close(gradients(model, (again * cotangent).sum()), half, 1e-9)


def test_checkpointing_gives_equal_gradients(tiny_sd3: Path) -> None:
    model = stirred(tiny_sd3).double()

    def found(**options: bool) -> dict[str, Tensor]:
        chain = SamplingChain(model, FlowEuler(3), model.encode(PROMPTS), recompute=Recompute(**options))
        return gradients(model, model.decode(LastK(2)(chain, noise(dtype=torch.float64))).square().mean())

    expected = found()
    assert_close(found(steps=True), expected, 1e-12)
    assert_close(found(blocks=True), expected, 1e-12)
    assert model.block_checkpointing
    assert_close(found(steps=True, blocks=True), expected, 1e-12)


def test_block_checkpointing_stores_fewer_activations(tiny_sd3: Path) -> None:
    model = opened(tiny_sd3)
    conditioning = model.encode(PROMPTS)

    def kept() -> int:
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(noise(), 0.5, conditioning)
        return elements

    whole = kept()
    model.checkpoint_blocks(True)
    assert kept() < 0.5 * whole
