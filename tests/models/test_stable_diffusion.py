import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models import DiffusionModel, Guidance, LoRA, Memory, StableDiffusion
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, Sampler
from lightning_draft.truncation import LastK, LowVariance

PROMPTS = ["a red cat", "dog, cat"]
SCHEDULERS = {DDIM: DDIMScheduler, DPMSolverPlusPlus: DPMSolverMultistepScheduler}


@pytest.fixture(params=["tiny_sd", "tiny_sd_v"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Both prediction types."""
    path: Path = request.getfixturevalue(request.param)
    return path


def plain(folder: Path, dtype: torch.dtype = torch.float64) -> StableDiffusionPipeline:
    """The same pipeline, opened by diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed starting latents."""
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=dtype)


def wide(folder: Path, **arguments: Any) -> StableDiffusion:
    """A model in float64 whose adapters are not zero."""
    model = StableDiffusion(str(folder), **arguments).double()
    stir(model)
    return model


def stir(model: StableDiffusion) -> None:
    """Give the adapters random values."""
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)


def sample(model: DiffusionModel, sampler: Sampler, start: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    """Latents at the end of the chain."""
    chain = SamplingChain(model, sampler, model.encode(prompts))
    return chain.advance(chain.start(start)).x


def gradients(model: StableDiffusion, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient in every trainable parameter."""
    names, values = zip(*model.trainable_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    """Assert equal names, and values that are equal relative to the norm of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


@pytest.mark.parametrize("sampler_class", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_equal_those_of_the_diffusers_pipeline(
    folder: Path, sampler_class: Callable[[int], Sampler], guidance_scale: float
) -> None:
    """Networks in float64; the tolerance is 1e-5 because diffusers' schedulers have float32 tables."""
    pipeline = plain(folder)
    pipeline.scheduler = SCHEDULERS[sampler_class].from_config(pipeline.scheduler.config)
    arguments = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "latents": noise()}
    theirs = pipeline(PROMPTS, negative_prompt=["tree"] * 2, output_type="latent", **arguments).images
    expected = pipeline(PROMPTS, negative_prompt=["tree"] * 2, output_type="pt", **arguments).images
    model = wide(folder, guidance=Guidance(guidance_scale, "tree"), lora=None)
    with torch.no_grad():
        ours = sample(model, sampler_class(6), noise())
        decoded = model.decode(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded.clamp(0, 1), expected, rtol=0, atol=1e-5)
    assert ((decoded > 0) & (decoded < 1)).double().mean() > 0.1


def test_float32_images_equal_those_of_the_diffusers_pipeline(folder: Path) -> None:
    pipeline = plain(folder, torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    start = noise(dtype=torch.float32)
    theirs = pipeline(PROMPTS, num_inference_steps=6, guidance_scale=3.0, latents=start, output_type="pt").images
    model = StableDiffusion(str(folder), guidance=Guidance(3.0))
    with torch.no_grad():
        ours = model.decode(sample(model, DDIM(6), start)).clamp(0, 1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_base_equals_the_pipeline_without_adapters_bitwise(folder: Path) -> None:
    bare = StableDiffusion(str(folder), lora=None)
    model = StableDiffusion(str(folder))
    stir(model)
    start = noise(dtype=torch.float32)
    with torch.no_grad():
        expected = sample(bare, DDIM(3), start)
        assert not torch.equal(sample(model, DDIM(3), start), expected)
        with model.base():
            assert torch.equal(sample(model, DDIM(3), start), expected)
            assert len(model.trainable_parameters()) == 64
        with model.adapter_scale(0.0):
            assert torch.equal(sample(model, DDIM(3), start), expected)
        with model.adapter_scale(1.0):
            tuned = sample(model, DDIM(3), start)
        assert torch.equal(sample(model, DDIM(3), start), tuned)


def test_base_context_ends_on_an_error(tiny_sd: Path) -> None:
    model = wide(tiny_sd)
    with torch.no_grad():
        before = sample(model, DDIM(1), noise())
        for context in (model.base(), model.adapter_scale(2.0)):
            with pytest.raises(KeyError), context:
                raise KeyError
        assert torch.equal(sample(model, DDIM(1), noise()), before)


@pytest.mark.parametrize("scale", [-0.5, 1.7])
def test_adapter_scale_adds_the_update_times_the_scale(tiny_sd: Path, scale: float) -> None:
    """Against merged weights `theta + scale (alpha / rank) B A`."""
    model = wide(tiny_sd, lora=LoRA(rank=4, alpha=2.0))
    bare = wide(tiny_sd, lora=None)
    own = dict(model.unet.named_parameters())
    for name, value in own.items():
        if "lora_A" in name:
            layer = bare.unet.get_submodule(name.split(".lora_A")[0])
            layer.weight.data += scale * 0.5 * own[name.replace("lora_A", "lora_B")].detach() @ value.detach()
    with torch.no_grad(), model.adapter_scale(scale):
        torch.testing.assert_close(sample(model, DDIM(2), noise()), sample(bare, DDIM(2), noise()))


def test_guidance_gradients_equal_hand_computation(tiny_sd: Path) -> None:
    """`e_u + w (e_c - e_u)`: weights `w` and `1 - w` in full, `w` and 0 in conditional."""
    w, x = 3.0, noise()
    model = wide(tiny_sd, guidance=Guidance(w))
    both = model.encode(PROMPTS)
    assert both.negative is not None
    text, negative = both.tensors["text"], both.negative.tensors["text"]
    time = torch.tensor(500)

    def slope(embedding: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        return gradients(model, (model.unet(x, time, embedding, return_dict=False)[0] * cotangent).sum())

    output = model(x, 500, both)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    conditional, unconditional = slope(text, cotangent), slope(negative, cotangent)
    full = {name: w * conditional[name] + (1 - w) * unconditional[name] for name in conditional}
    assert_close(gradients(model, (output * cotangent).sum()), full, 1e-9)

    model.guidance = replace(model.guidance, gradient="conditional")
    again = model(x, 500, both)
    torch.testing.assert_close(again, output)
    half = {name: w * value for name, value in conditional.items()}
    assert_close(gradients(model, (again * cotangent).sum()), half, 1e-9)


def test_number_of_network_calls(tiny_sd: Path) -> None:
    """One batched call with guidance, two calls if one has no gradient, and no unconditional call without guidance."""
    model = StableDiffusion(str(tiny_sd))
    sizes: list[tuple[int, bool]] = []
    model.unet.register_forward_hook(lambda _, inputs, output: sizes.append((len(inputs[0]), output[0].requires_grad)))
    conditioning, x = model.encode(PROMPTS), noise(dtype=torch.float32)
    model(x, 500, conditioning)
    model.guidance = replace(model.guidance, gradient="conditional")
    model(x, 500, conditioning)
    with torch.no_grad():
        model(x, 500, conditioning)
    model.guidance = Guidance(1.0)
    model(x, 500, conditioning)
    assert sizes == [(4, True), (2, False), (2, True), (4, False), (2, True)]


def test_initial_gradient_of_a_is_zero_and_of_b_is_not(folder: Path) -> None:
    model = StableDiffusion(str(folder)).double()
    latents = LastK(1)(SamplingChain(model, DDIM(4), model.encode(PROMPTS)), noise())
    found = gradients(model, model.decode(latents).mean())
    assert all(not value.any() for name, value in found.items() if "lora_A" in name)
    assert all(value.any() for name, value in found.items() if "lora_B" in name)


@pytest.mark.parametrize("mode", ["step", "block", "both"])
@pytest.mark.parametrize("gradient", ["full", "conditional"])
def test_checkpointing_gives_equal_gradients(tiny_sd_v: Path, mode: str, gradient: Any) -> None:
    model = wide(tiny_sd_v, guidance=Guidance(2.0, gradient=gradient))
    conditioning = model.encode(PROMPTS)

    def found(**options: bool) -> dict[str, Tensor]:
        chain = SamplingChain(model, DDIM(3), conditioning, recompute=Recompute(**options))
        return gradients(model, model.decode(LastK(2)(chain, noise())).square().mean())

    expected = found()
    model.memory = Memory(checkpoint_decoder=True)
    assert_close(found(steps=mode != "block", blocks=mode != "step"), expected, 1e-12)
    assert model.block_checkpointing == (mode != "step")


def test_block_checkpointing_stores_fewer_activations(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd))
    conditioning, x = model.encode(PROMPTS), noise(dtype=torch.float32)

    def kept() -> int:
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, 500, conditioning)
        return elements

    whole = kept()
    model.checkpoint_blocks(True)
    assert kept() < 0.5 * whole


def test_dropout_is_disabled_in_training(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd)).train()
    model.checkpoint_blocks(True)
    assert model.training
    assert not any(part.training for part in model.modules() if part is not model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_trains_float32_adapters(tiny_sd_v: Path, dtype: str) -> None:
    model = StableDiffusion(str(tiny_sd_v), dtype=dtype, guidance=Guidance(2.0))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    assert {value.dtype for value in frozen.values()} == {getattr(torch, dtype)}
    parameters = [value for _, value in model.trainable_parameters()]
    assert {value.dtype for value in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        chain = SamplingChain(model, DDIM(2), model.encode(PROMPTS))
        latents = LowVariance(1)(chain, noise(dtype=torch.float32))
        assert latents.dtype == torch.float32
        loss = model.decode(latents)[:2].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3
    for name, value in model.named_parameters():
        if name in frozen:
            assert value.grad is None
            assert torch.equal(value, frozen[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(folder: Path, dtype: str) -> None:
    start = noise(dtype=torch.float32)
    models = [StableDiffusion(str(folder), dtype=each, guidance=Guidance(2.0)) for each in ("float32", dtype)]
    with torch.no_grad():
        whole, half = (model.decode(sample(model, DDIM(3), start)) for model in models)
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < (0.02 if dtype == "bfloat16" else 0.002)


def test_decoder_can_have_its_own_precision(tiny_sd: Path) -> None:
    whole = StableDiffusion(str(tiny_sd))
    mixed = StableDiffusion(str(tiny_sd), dtype="bfloat16", memory=Memory(vae_dtype="float32"))
    latents = noise(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(mixed.decode(latents), whole.decode(latents))
        expected = mixed.decode(latents)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixed.decode(latents), expected)
            assert not torch.equal(whole.decode(latents), expected)


def test_decoding_uses_the_scaling_factor_of_the_autoencoder(tiny_sd: Path) -> None:
    model = wide(tiny_sd)
    latents = noise()
    with torch.no_grad():
        raw = model.vae.decode(latents / 0.18215, return_dict=False)[0]
        torch.testing.assert_close(model.decode(latents), raw / 2 + 0.5)
        model.vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
        raw = model.vae.decode(latents / 0.5 + 0.1, return_dict=False)[0]
        torch.testing.assert_close(model.decode(latents), raw / 2 + 0.5)


@pytest.mark.parametrize("recompute", [False, True])
def test_decoding_in_chunks_equals_decoding_at_once(tiny_sd: Path, recompute: bool) -> None:
    model = wide(tiny_sd)
    latents = noise(3).requires_grad_()
    whole = model.decode(latents)
    (expected,) = torch.autograd.grad(whole.square().sum(), latents)
    model.memory = Memory(2, recompute)
    parts = model.decode(latents)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), latents)[0], expected)


def test_embeddings_equal_those_of_the_pipeline_and_are_cached(tiny_sd: Path) -> None:
    model = wide(tiny_sd, guidance=Guidance(negative_prompt="tree"))
    calls: list[int] = []
    assert model.text_encoder is not None
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = model.encode([*PROMPTS, PROMPTS[0]])
    assert len(calls) == 3
    second = model.encode(PROMPTS[::-1])
    assert len(calls) == 3
    text, negative = plain(tiny_sd).encode_prompt(PROMPTS, torch.device("cpu"), 1, True, ["tree", "tree"])
    torch.testing.assert_close(first.tensors["text"][:2], text)
    torch.testing.assert_close(second.tensors["text"], text.flip(0))
    assert second.negative is not None
    torch.testing.assert_close(second.negative.tensors["text"], negative)


def test_text_encoder_can_be_released(tiny_sd: Path) -> None:
    model = wide(tiny_sd)
    model.precompute(iter(PROMPTS))
    before = model.encode(PROMPTS)
    model.release_text_encoder()
    after = model.encode(PROMPTS)
    assert all(torch.equal(after.tensors[name], value) for name, value in before.tensors.items())
    assert not any(name.startswith("text_encoder") for name in model.state_dict())
    with pytest.raises(RuntimeError, match="'a new one' has no embedding; pass all prompts.* to precompute"):
        model.encode(["a new one"])


def test_prompts_embedded_in_validation_can_be_used_in_training(tiny_sd: Path) -> None:
    """Under inference mode and autocast, as in the Trainer's validation."""
    model = StableDiffusion(str(tiny_sd))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.encode(PROMPTS)
    fresh = StableDiffusion(str(tiny_sd)).encode(PROMPTS)
    conditioning = model.encode(PROMPTS)
    assert torch.equal(conditioning.tensors["text"], fresh.tensors["text"])
    gradients(model, model(noise(dtype=torch.float32), 10, conditioning).sum())


def test_long_prompts_are_truncated_with_a_warning(tiny_sd: Path) -> None:
    with pytest.warns(UserWarning, match="reads 12 tokens and truncates the prompt: a very long"):
        StableDiffusion(str(tiny_sd)).encode(["a very long prompt"])


def test_noise_is_generated_on_the_generators_device(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), dtype="bfloat16")
    noise_ours = model.noise(2, torch.Generator().manual_seed(5))
    expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise_ours, expected)
    assert model.image_size == (16, 16)


def test_networks_are_child_modules(tiny_sd: Path) -> None:
    """Sharding strategies and checkpoints depend on this."""
    model = StableDiffusion(str(tiny_sd))
    assert set(dict(model.named_children())) == {"unet", "vae", "text_encoder"}
    assert all(name.startswith("unet.") and "lora_" in name for name, _ in model.trainable_parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.encode(PROMPTS).tensors["text"], model.encode(PROMPTS).tensors["text"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8' is not a valid choice; write one of float32"),
    ],
)
def test_invalid_arguments_are_rejected(tiny_sd: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(tiny_sd), **arguments)
