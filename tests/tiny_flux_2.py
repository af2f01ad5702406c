"""Small random FLUX.2 Klein pipelines, written in the format of real ones."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny_pipelines import SMALL_AUTOENCODER, perturb
from tests.tiny_qwen import tokenizer


def _autoencoder() -> AutoencoderKLFlux2:
    """For images of twice the latents' size, with statistics of the batch normalization that are not 0 and 1."""
    vae = AutoencoderKLFlux2(**SMALL_AUTOENCODER, latent_channels=2)
    vae.bn.running_mean.copy_(0.3 * torch.randn(8))
    vae.bn.running_var.copy_(0.5 + torch.rand(8))
    return perturb(vae)


def flux_2_klein(folder: Path, distilled: bool = False) -> None:
    """FLUX.2 Klein, the base model or the distilled one."""
    words = tokenizer()
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(),
        text_encoder=perturb(Qwen3ForCausalLM(text)),
        tokenizer=words,
        transformer=perturb(transformer),
        is_distilled=distilled,
    ).save_pretrained(folder)
