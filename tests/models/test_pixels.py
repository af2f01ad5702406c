"""Pixel-space models: their classes, channels and learned variances, and the code that loads their LoRA files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard

from lightning_draft.chain import SamplingChain
from lightning_draft.cli.summary import lora_lines
from lightning_draft.errors import ConfigurationError
from lightning_draft.model_card import write_card
from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion
from lightning_draft.models.pixels import PixelDiffusion
from lightning_draft.samplers import DDIM
from tests.tiny_families import BETAS, pixels

COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def opened(folder: Path, scheduler: dict[str, Any] | None = None, size: int = 16, **network: Any) -> PixelDiffusion:
    """A pipeline whose network is edited."""
    pixels(folder)
    pipeline = DDPMPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    unet = UNet2DModel.from_config({**pipeline.unet.config, **network})
    scheduler = DDPMScheduler(**{**BETAS, "clip_sample": False, **(scheduler or {})})
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return PixelDiffusion(str(folder), lora=None, height=size, width=size)


@torch.no_grad()
def test_predicted_variances_are_not_part_of_the_predicted_image(tmp_path: Path) -> None:
    model = opened(tmp_path, {"variance_type": "learned_range"}, out_channels=6)
    x = model.noise(2, torch.Generator().manual_seed(1))
    raw = model.unet(x, 400).sample
    expected = model.pipeline.scheduler.step(raw, 400, x).pred_original_sample
    assert raw.shape[1] == 6
    torch.testing.assert_close(model.denoise(x, 400, model.encode(["a", "b"])), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cosine_schedule_gives_the_images_of_diffusers(tmp_path: Path) -> None:
    """It has almost no signal at the last timestep, which a leading grid does not contain."""
    model = opened(tmp_path, COSINE)
    x = start = model.noise(2, torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        x = scheduler.step(model.unet(x, t).sample, t, x).prev_sample
    chain = SamplingChain(model, DDIM(5), model.encode(["a", "b"]))
    torch.testing.assert_close(chain.advance(chain.start(start)).x, x, rtol=1e-4, atol=1e-4)


def test_gray_images_are_rgb_images_with_equal_channels(tmp_path: Path) -> None:
    model = opened(tmp_path, in_channels=1, out_channels=1)
    x = model.noise(2)
    assert x.shape == (2, 1, 16, 16)
    assert torch.equal(model.decode(x), torch.cat([x, x, x], 1) / 2 + 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, r"in_channels=4 of the pipeline's unet .* 1 or 3 channels"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep .* with num_class_embeds"),
        ({"scheduler": {**COSINE, "timestep_spacing": "trailing"}}, "timestep_spacing=trailing .* to leading"),
        ({"scheduler": {**COSINE, "rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr to false"),
        ({"size": 15}, "height=15 and width=15 must be multiples of 2 for this model; write 14 and 14"),
    ],
)
def test_unsupported_networks_and_sizes_are_rejected(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        opened(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": Memory(tile=32)}, "memory.tile=32 has no effect on a model in pixel space, .*; leave it out"),
        ({"memory": Memory(decode_chunk=1)}, "memory.decode_chunk=1 has no effect on a model in pixel space"),
        ({"memory": Memory(vae_dtype="float16")}, "memory.vae_dtype='float16' has no effect on a model in pixel"),
        ({"guidance": Guidance(5.0)}, "guidance.scale=5.0 cannot be used with .* read no text .*; write 1, or leave"),
    ],
)
def test_options_of_decoders_and_of_text_are_rejected(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pixels(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        PixelDiffusion(str(tmp_path), **options)


def test_default_prompts_are_class_numbers_or_names_of_images(tmp_path: Path, tiny_sd: Path) -> None:
    classes = opened(tmp_path / "classes", num_class_embeds=3)
    assert (classes.default_prompts(2), classes.default_prompts(9)) == (["0", "1"], ["0", "1", "2"])
    assert opened(tmp_path / "any").default_prompts(2) == ["image 1", "image 2"]
    assert StableDiffusion(str(tiny_sd), lora=None).default_prompts(2) == []


def test_the_code_that_a_run_prints_loads_its_file(tmp_path: Path, tiny_sd: Path) -> None:
    """`DDPMPipeline` has no `load_lora_weights`."""
    opened(tmp_path)
    model = PixelDiffusion(str(tmp_path), lora=LoRA(2))
    for _, value in model.trainable_parameters():
        value.data.normal_()
    model.save_lora(tmp_path / "best.safetensors")
    card = ModelCard(write_card(model, tmp_path / "best.safetensors", {"base": "a/b"}, comfy=True))
    assert card.data.pipeline_tag == "unconditional-image-generation"
    lines = list(lora_lines(model, tmp_path / "best.safetensors"))
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in lines[1:]), names)
    x, conditioning = model.noise(1), model.encode(["a"])
    assert "DDPMPipeline of diffusers loads no LoRA files" in lines[0]
    assert torch.equal(names["model"](x, 400, conditioning), model(x, 400, conditioning))
    diffusers = list(lora_lines(StableDiffusion(str(tiny_sd), lora=None), Path("best.safetensors")))
    assert diffusers[-1].strip() == 'pipe.load_lora_weights("best.safetensors")'
