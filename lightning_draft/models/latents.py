"""Sizes of latents and of the images that they decode to."""

from typing import Any

from torch import nn

from lightning_draft.errors import ConfigurationError


def scale_factor(vae: Any) -> int:
    """Return the number of image pixels per latent pixel, along each side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_size(vae: nn.Module, denoiser: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width of the latents.

    Args:
        vae: The autoencoder.
        denoiser: The network, whose config gives the default size, the patch size and the largest size.
        height: Height of the images in pixels; by default the size that the denoiser was trained for.
        width: Width of the images in pixels, likewise.

    Raises:
        ConfigurationError: Only one is given, or the networks do not accept the size.
    """
    factor, config = scale_factor(vae), denoiser.config
    if height is None and width is None:
        if config.get("sample_size") is None:
            raise ConfigurationError(
                "the config of the pipeline's denoiser has no image size (sample_size is null); set height and width, "
                "such as height=512 and width=512"
            )
        size = config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])
    if height is None or width is None:
        raise ConfigurationError(
            f"height={height} and width={width} must be given together; write both, such as {height or width}"
        )
    multiple = factor * (config.get("patch_size") or 1)
    limit = config.get("pos_embed_max_size")
    largest = None if limit is None else multiple * limit
    for name, pixels in (("height", height), ("width", width)):
        if pixels < multiple or pixels % multiple or (largest is not None and pixels > largest):
            bound = "" if largest is None else f" up to {largest}"
            raise ConfigurationError(
                f"{name}={pixels} must be a multiple of {multiple}{bound} for this model; write "
                f"{max(1, min(pixels, largest or pixels) // multiple) * multiple}"
            )
    return height // factor, width // factor
