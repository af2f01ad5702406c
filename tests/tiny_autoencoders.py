"""Small random autoencoders of the classes of published ones."""

from typing import Any

from diffusers import AutoencoderKL

from tests.tiny_pipelines import SMALL_AUTOENCODER, perturb


def autoencoder(channels: int, **changes: Any) -> AutoencoderKL:
    """One for images of twice the latents' size."""
    return perturb(AutoencoderKL(**{**SMALL_AUTOENCODER, "latent_channels": channels, **changes}))


def flux_autoencoder(channels: int = 4) -> AutoencoderKL:
    """That of FLUX.1, with the scaling and shift of the published one."""
    scaling = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    return autoencoder(channels, **scaling, use_quant_conv=False, use_post_quant_conv=False)
