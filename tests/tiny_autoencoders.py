"""Small random autoencoders of the classes of published ones."""

from typing import Any

from diffusers import AutoencoderKL

from tests.tiny_pipelines import perturb


def autoencoder(channels: int, **changes: Any) -> AutoencoderKL:
    """One for images of twice the latents' size."""
    config = {
        "sample_size": 16,
        "latent_channels": channels,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return perturb(AutoencoderKL(**{**config, **changes}))


def flux_autoencoder(channels: int = 4) -> AutoencoderKL:
    """That of FLUX.1, with the scaling and shift of the published one."""
    scaling = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    return autoencoder(channels, **scaling, use_quant_conv=False, use_post_quant_conv=False)
