"""Stable Diffusion XL against diffusers' pipeline, with a small random pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion, StableDiffusionXL
from lightning_draft.samplers import DDIM

PROMPTS = ["a red cat", "dog, cat"]


def plain(folder: Path) -> StableDiffusionXLPipeline:
    """The same pipeline, opened by diffusers, with a deterministic sampler."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(folder: Path, **arguments: Any) -> StableDiffusionXL:
    """A model whose adapters are not zero."""
    model = StableDiffusionXL(str(folder), **arguments)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


@torch.no_grad()
def sampled_images(model: StableDiffusionXL, noise: Tensor, steps: int = 4) -> Tensor:
    """Images of both prompts."""
    chain = SamplingChain(model, DDIM(steps), model.encode(PROMPTS))
    return model.decode(chain.advance(chain.start(noise)).x)


def noise(height: int = 8, width: int = 8) -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("scale", "negative", "size"),
    [(1.0, "", None), (3.0, "", None), (3.0, "tree", None), (3.0, "tree", (16, 24))],
    ids=["no guidance", "empty negative prompt", "negative prompt", "non-square"],
)
def test_images_equal_those_of_the_diffusers_pipeline(
    tiny_sdxl: Path, scale: float, negative: str, size: tuple[int, int] | None
) -> None:
    """An empty negative prompt is embedded as zeros, and the size conditioning is the image size."""
    options: dict[str, Any] = {} if size is None else {"height": size[0], "width": size[1]}
    start = noise() if size is None else noise(size[0] // 2, size[1] // 2)
    model = opened(tiny_sdxl, lora=None, guidance=Guidance(scale, negative), **options)
    ours = sampled_images(model, start, steps=6)
    theirs = plain(tiny_sdxl)(
        PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        guidance_scale=scale,
        num_inference_steps=6,
        latents=start,
        output_type="pt",
        **(options or {"height": 16, "width": 16}),
    ).images
    assert ours.shape[-2:] == (size or (16, 16)) == model.image_size
    torch.testing.assert_close(ours.clamp(0, 1), theirs, rtol=0, atol=2e-5)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.1


def test_exported_lora_gives_the_same_images_in_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = opened(tiny_sdxl, lora=LoRA(4, alpha=6.0), guidance=Guidance(2.0))
    model.save_lora(tmp_path / "lora.safetensors")
    pipeline = plain(tiny_sdxl)
    options = {"guidance_scale": 2.0, "num_inference_steps": 4, "latents": noise(), "output_type": "pt"}
    base = pipeline(PROMPTS, height=16, width=16, **options).images
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    theirs = pipeline(PROMPTS, height=16, width=16, **options).images
    ours = sampled_images(model, noise()).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (ours - base).abs().mean() > 0.004


def test_decoder_with_force_upcast_runs_in_float32(tiny_sdxl: Path) -> None:
    half = StableDiffusionXL(str(tiny_sdxl), dtype="bfloat16", lora=None)
    assert half.unet.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    latents = noise()
    expected = StableDiffusionXL(str(tiny_sdxl), lora=None).decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.decode(latents), expected)
    chosen = StableDiffusionXL(str(tiny_sdxl), dtype="bfloat16", lora=None, memory=Memory(vae_dtype="bfloat16"))
    assert chosen.vae.dtype == torch.bfloat16


def test_error_for_other_families_names_the_class(tiny_sdxl: Path, tiny_sd: Path) -> None:
    with pytest.raises(ConfigurationError, match="open it with StableDiffusionXL"):
        StableDiffusion(str(tiny_sdxl))
    with pytest.raises(ConfigurationError, match="open it with StableDiffusion$"):
        StableDiffusionXL(str(tiny_sd))
    with pytest.raises(ConfigurationError, match="height=20 and width=None must be given together"):
        StableDiffusionXL(str(tiny_sdxl), height=20)
