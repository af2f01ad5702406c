"""Small random pipelines in the format of published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
TOKENS = 12
STABLE_DIFFUSION_15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
SMALL_AUTOENCODER: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
"""Options of autoencoders for images of twice the latents' size."""


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's two files of byte-pair encoding, with single letters and two complete words."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    vocab = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS})
    )
    return CLIPTokenizer.from_pretrained(folder)


def perturb(module: nn.Module) -> nn.Module:
    """Change parameters that are initialized to 0 or 1, so that every term of the network has an effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module.eval()


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextConfig(vocab_size=len(words), max_position_embeddings=TOKENS, **{**ends, **size, **changes})


def write_pipeline(folder: Path, scheduler: Any, **unet: Any) -> Path:
    """Write a random Stable Diffusion pipeline for 16x16 images and 8x8x4 latents, and return its folder.

    Args:
        folder: Where.
        scheduler: Instance of a diffusers scheduler.
        **unet: Overrides of the denoiser's configuration.
    """
    torch.manual_seed(0)
    words = write_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    text = text_config(words)
    network = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    vae = AutoencoderKL(**SMALL_AUTOENCODER, latent_channels=4)
    pipeline = StableDiffusionPipeline(
        vae=perturb(vae),
        text_encoder=perturb(CLIPTextModel(text)),
        tokenizer=words,
        unet=perturb(UNet2DConditionModel(**{**network, **unet})),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


SMALL_DENOISER = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""A denoiser of few operations, each of which takes long without weights."""


def write_sdxl_pipeline(folder: Path) -> Path:
    """Write a random Stable Diffusion XL pipeline for 16x16 images and 8x8x4 latents, and return its folder."""
    torch.manual_seed(0)
    words = write_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 2),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        transformer_layers_per_block=(1, 1),
    )
    vae = AutoencoderKL(**SMALL_AUTOENCODER, latent_channels=4, scaling_factor=0.13025, force_upcast=True)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionXLPipeline(
        vae=perturb(vae),
        text_encoder=perturb(CLIPTextModel(text_config(words))),
        text_encoder_2=perturb(CLIPTextModelWithProjection(text_config(words, projection_dim=12, hidden_act="gelu"))),
        tokenizer=words,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder.with_name(folder.name + "-tokenizer"), pad_token="z"),
        unet=perturb(network),
        scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def t5_encoder(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """An encoder and its unigram tokenizer: single letters, and two words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581red", -1.0), ("\u2581cat", -1.0), ("\u2581", -2.0)]
    words = T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config), words


def write_sd3_pipeline(folder: Path, **transformer: Any) -> Path:
    """Write a random Stable Diffusion 3.5 pipeline for 16x16 images and 8x8x16 latents, and return its folder.

    Args:
        folder: Where.
        **transformer: Overrides of the denoiser's configuration.
    """
    torch.manual_seed(0)
    words = write_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    more_words = CLIPTokenizer.from_pretrained(folder.with_name(folder.name + "-tokenizer"), pad_token="z")
    t5, pieces = t5_encoder(40)
    network = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    vae = AutoencoderKL(
        **SMALL_AUTOENCODER,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=perturb(SD3Transformer2DModel(**{**network, **transformer})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=perturb(vae),
        text_encoder=perturb(CLIPTextModelWithProjection(text_config(words, projection_dim=8))),
        tokenizer=words,
        text_encoder_2=perturb(CLIPTextModelWithProjection(text_config(words, projection_dim=12, hidden_act="gelu"))),
        tokenizer_2=more_words,
        text_encoder_3=perturb(t5),
        tokenizer_3=pieces,
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    published = {key: value for key, value in index.items() if key not in ("image_encoder", "feature_extractor")}
    published["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(published))
    return folder
