"""Shared fixtures: small random pipelines in the format of published ones."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tests.tiny_pipelines import (
    SMALL_DENOISER,
    STABLE_DIFFUSION_15,
    write_pipeline,
    write_sd3_pipeline,
    write_sdxl_pipeline,
)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let jobs in the background ignore it


@pytest.fixture(scope="session")
def small_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the denoiser `SMALL_DENOISER`."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "small-sd", scheduler, **SMALL_DENOISER)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that predicts the noise, with the scheduler file of Stable Diffusion 1.5."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-sd"
    write_pipeline(folder, PNDMScheduler(**STABLE_DIFFUSION_15, skip_prk_steps=True))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": False}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that predicts velocities on a trailing grid, down to zero noise."""
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sd-v", scheduler)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the components of Stable Diffusion XL."""
    return write_sdxl_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that predicts the flow from three text encoders, with the parts of Stable Diffusion 3.5 medium."""
    return write_sd3_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A two-tower CLIP for 16x16 images, with the tokenizer of `tiny_sd`."""
    words = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **ends, "vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=8)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("clips") / "tiny-clip"
    model.eval().save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), words).save_pretrained(folder)
    return folder
