"""Stable Diffusion 3 with a small random pipeline, in this package and in diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models import (
    DiffusionModel,
    Guidance,
    StableDiffusion3,
    TextEncoding,
)
from lightning_draft.samplers import FlowEuler, Sampler

PROMPTS = ["a red cat", "dog, cat"]
LENGTH = 20


OMIT_T5 = ("text_encoder_3",)
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def plain(folder: Path, dtype: torch.dtype = torch.float32, **parts: None) -> StableDiffusion3Pipeline:
    """The same pipeline as diffusers opens it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(batch: int = 2, dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    """Fixed starting latents."""
    return torch.randn(batch, 16, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


def opened(folder: Path, **arguments: Any) -> StableDiffusion3:
    """A model whose T5 reads only a few tokens."""
    return StableDiffusion3(str(folder), **{"text": TextEncoding(LENGTH), "guidance": Guidance(2.0), **arguments})


def stirred(folder: Path, **arguments: Any) -> StableDiffusion3:
    """A model whose adapters are not zero."""
    model = opened(folder, **arguments)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


def sample(model: DiffusionModel, start: Tensor, sampler: Sampler | None = None) -> Tensor:
    """Latents at the end of the chain."""
    chain = SamplingChain(model, FlowEuler(4) if sampler is None else sampler, model.encode(PROMPTS))
    return chain.advance(chain.start(start)).x


@torch.no_grad()
def sampled_images(model: DiffusionModel) -> Tensor:
    """Clamped images."""
    return model.decode(sample(model, noise())).clamp(0, 1)


def pipeline_images(pipeline: StableDiffusion3Pipeline, **arguments: Any) -> Tensor:
    """The same from diffusers."""
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": LENGTH, "output_type": "pt"}
    images: Tensor = pipeline(PROMPTS, latents=noise(), **{**settings, **arguments}).images
    return images


def edited(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline with changes to one of its JSON files."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy
