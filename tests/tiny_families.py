"""Small random pipelines of the newer model families, written in the format of real ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    UNet2DModel,
)
from transformers import CLIPTextModel, Gemma2Config, Gemma2Model

from tests.tiny_autoencoders import autoencoder, flux_autoencoder
from tests.tiny_flux_2 import flux_2_klein
from tests.tiny_pipelines import perturb, t5_encoder, text_config, write_tokenizer
from tests.tiny_qwen import qwen_image, z_image

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def flux(folder: Path, guidance_embeds: bool = True) -> None:
    """FLUX.1 dev, or schnell without `guidance_embeds`."""
    words = write_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    t5, pieces = t5_encoder(40)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=flux_autoencoder(),
        text_encoder=perturb(CLIPTextModel(text_config(words))),
        tokenizer=words,
        text_encoder_2=perturb(t5),
        tokenizer_2=pieces,
        transformer=perturb(transformer),
    ).save_pretrained(folder)


def flux_schnell(folder: Path) -> None:
    """FLUX.1 schnell."""
    flux(folder, guidance_embeds=False)


def chroma(folder: Path) -> None:
    """Chroma."""
    t5, pieces = t5_encoder(40)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux_autoencoder(),
        text_encoder=perturb(t5),
        tokenizer=pieces,
        transformer=perturb(transformer),
    ).save_pretrained(folder)


def pixart_sigma(folder: Path) -> None:
    """PixArt-Sigma."""
    t5, pieces = t5_encoder(40)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=40,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    PixArtSigmaPipeline(
        tokenizer=pieces,
        text_encoder=perturb(t5),
        vae=autoencoder(4, scaling_factor=0.13025),
        transformer=perturb(transformer),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    ).save_pretrained(folder)


def sana(folder: Path, sprint: bool = False) -> None:
    """Sana, or Sana-Sprint."""
    _, pieces = t5_encoder(8)
    config = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        max_position_embeddings=2048,
    )
    transformer = SanaTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipeline = SanaSprintPipeline if sprint else SanaPipeline
    pipeline(
        tokenizer=pieces,
        text_encoder=perturb(Gemma2Model(config)),
        vae=perturb(vae),
        transformer=perturb(transformer),
        scheduler=SCMScheduler() if sprint else FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def sana_sprint(folder: Path) -> None:
    """Sana-Sprint."""
    sana(folder, sprint=True)


def pixels(folder: Path, classes: int | None = None) -> None:
    """A DDPM, of classes where a number of them is given."""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=classes,
    )
    DDPMPipeline(unet=perturb(unet), scheduler=DDPMScheduler(**BETAS)).save_pretrained(folder)


def pixels_of_classes(folder: Path) -> None:
    """A DDPM of 10 classes."""
    pixels(folder, classes=10)


WRITERS: dict[str, Callable[[Path], None]] = {
    "flux": flux,
    "flux_schnell": flux_schnell,
    "flux_2_klein": flux_2_klein,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "sana_sprint": sana_sprint,
    "chroma": chroma,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "pixels": pixels,
    "pixels_of_classes": pixels_of_classes,
}


def write(name: str, folder: Path) -> Path:
    """Write the pipeline of that name and return its folder."""
    torch.manual_seed(0)
    WRITERS[name](folder)
    return folder
