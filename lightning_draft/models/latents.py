"""Latents: their size, how they are packed into tokens, and how they are scaled for the autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError


def affine(vae: Any, latents: Tensor) -> Tensor:
    """Return `z / scaling_factor + shift_factor`."""
    scaled: Tensor = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return scaled


def per_channel(vae: Any, latents: Tensor) -> Tensor:
    """Return `z std + mean` with the statistics of each channel in the autoencoder's config."""
    mean, std = (latents.new_tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return latents * std + mean


def decode_image(vae: Any, latents: Tensor) -> Tensor:
    """Decode with the autoencoder's own method."""
    images: Tensor = vae.decode(latents, return_dict=False)[0]
    return images


def decode_frame(vae: Any, latents: Tensor) -> Tensor:
    """Decode with the video decoder of Qwen-Image, as one frame.

    Its own method also clamps images, which removes gradients, and keeps activations for further frames.
    """
    images: Tensor = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2))).squeeze(2)
    return images


@dataclass(frozen=True)
class Latents:
    """How a family's latents relate to its images, its denoiser and its autoencoder.

    Args:
        patch: Side of the squares of latent cells that are one token of the denoiser; by default that of its config.
        packed: Whether the denoiser's input is tokens, with `patch^2` times the channels of a latent.
        default_size: Height and width of images in pixels, if the denoiser's config does not give it.
        cells: How many of the autoencoder's latent cells are one cell of the denoiser's latents, along each side.
        unscale: Function of the autoencoder and the denoiser's latents that returns the autoencoder's input.
        decode: Function of the autoencoder and its input that returns images in [-1, 1].
    """

    patch: int | None = None
    packed: bool = False
    default_size: int | None = None
    cells: int = 1
    unscale: Callable[[Any, Tensor], Tensor] = affine
    decode: Callable[[Any, Tensor], Tensor] = decode_image

    def channels(self, denoiser: Any) -> int:
        """Return the number of channels of a latent."""
        channels: int = denoiser.config.in_channels
        return channels // (self.patch or 1) ** 2 if self.packed else channels

    def factor(self, vae: Any) -> int:
        """Return the side of a latent cell in pixels; 1 without an autoencoder."""
        if vae is None:
            return 1
        stages = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
        halvings = len(vae.config.temperal_downsample) if stages is None else len(stages) - 1
        return int(2**halvings) * self.cells

    def size(self, vae: Any, denoiser: Any, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width of the latents.

        Args:
            vae: The autoencoder.
            denoiser: The network, whose config gives the default size, the patch size and the largest size.
            height: Height of the images in pixels; by default the size that the denoiser was trained for.
            width: Width of the images in pixels.

        Raises:
            ConfigurationError: Only one is given, or the networks do not accept the size.
        """
        factor, config = self.factor(vae), denoiser.config
        if height is None and width is None:
            return self._default(config, factor)
        if height is None or width is None:
            raise ConfigurationError(
                f"height={height} and width={width} must be given together; write both, such as 512"
            )
        multiple = factor * (self.patch or config.get("patch_size") or 1)
        limit = config.get("pos_embed_max_size")
        largest = None if limit is None else multiple * limit
        for name, pixels in (("height", height), ("width", width)):
            if pixels < multiple or pixels % multiple or (largest is not None and pixels > largest):
                bound = "" if largest is None else f" up to {largest}"
                raise ConfigurationError(
                    f"{name}={pixels} must be a positive multiple of {multiple}{bound} for this model; write "
                    f"{max(1, min(pixels, largest or pixels) // multiple) * multiple}"
                )
        return height // factor, width // factor

    def tokens(self, size: tuple[int, int]) -> int:
        """Return the number of tokens of an image whose latents have this height and width."""
        patch = self.patch or 1
        return (size[0] // patch) * (size[1] // patch)

    def _default(self, config: Any, factor: int) -> tuple[int, int]:
        if self.default_size is not None:
            return self.default_size // factor, self.default_size // factor
        if config.get("sample_size") is None:
            raise ConfigurationError(
                "the config of the pipeline's denoiser has no image size (sample_size is null); set height and width, "
                "such as height=512 and width=512"
            )
        size = config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


def pack(latents: Tensor) -> Tensor:
    """Return squares of 2x2 cells as tokens: `(B, C, H, W)` to `(B, H/2 W/2, 4 C)`, channels before positions."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as latents of this height and width, the inverse of `pack`."""
    batch, _, channels = tokens.shape
    blocks = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """Return `(0, row, column)` of every token of an image of `height x width` tokens, `(height width, 3)`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(device)
