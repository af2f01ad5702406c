"""Decoding of latents into images, whole, in chunks or by tiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.arguments import given, integer, integer_at_least, one_of
from lightning_draft.errors import ConfigurationError

_TILED = ("AutoencoderKL", "AutoencoderKLFlux2")  # others tile otherwise, or do not name the size in latents

PIXELS = 2**18
"""Default number of pixels of the images that are decoded at a time."""

Precision = Literal["float32", "bfloat16", "float16"]
Decode = Callable[[Any, Tensor], Tensor]

_LISTS = nn.ModuleList, nn.Sequential


@dataclass(frozen=True)
class Memory:
    """Options that lower the peak memory of the decoder, or set its precision.

    Args:
        decode_chunk: Decode this many images at a time; by default as many as have 2^18 pixels (one of 512x512, 64 of
            64x64), and at least one.
        checkpoint_decoder: Recompute the decoder's activations in the backward pass, chunk by chunk; by default if a
            batch has several chunks, because this lowers the peak. `block` also recomputes each block of the decoder
            separately, for any autoencoder: less memory, and one more pass of the decoder.
        tile: Decode in overlapping tiles with sides of this many pixels, a multiple of 32, and recompute each tile in
            the backward pass, so that only the activations of one tile are stored. Images change, because each tile is
            normalized by itself. Only for the autoencoders `AutoencoderKL` and `AutoencoderKLFlux2`.
        vae_dtype: Precision of the autoencoder's weights and activations, independent of the Trainer's precision; by
            default the model's `dtype`.
    """

    decode_chunk: int | None = None
    checkpoint_decoder: bool | Literal["block"] | None = None
    tile: int | None = None
    vae_dtype: Precision | None = None

    def __post_init__(self) -> None:
        if self.decode_chunk is not None:
            integer_at_least(
                "memory.decode_chunk", self.decode_chunk, 1, "leave it out for a number that suits the image size"
            )
        if not isinstance(self.checkpoint_decoder, bool | None) and self.checkpoint_decoder != "block":
            raise ConfigurationError(
                f"memory.checkpoint_decoder={self.checkpoint_decoder!r} must be true, false or block; write block for "
                "the lowest peak, or leave it out"
            )
        if self.tile is not None and (integer("memory.tile", self.tile, "write 512") <= 0 or self.tile % 32):
            raise ConfigurationError(f"memory.tile={self.tile} must be a multiple of 32 pixels; write 512")
        if self.vae_dtype is not None:
            one_of("memory.vae_dtype", self.vae_dtype, get_args(Precision))

    def check(self, vae: Any) -> None:
        """Check that an autoencoder supports the options.

        Args:
            vae: The autoencoder; `None` if latents are images.

        Raises:
            ConfigurationError: Tiles are wanted, and it has none; or there is no autoencoder.
        """
        changes = {name: value for name, value in given(**vars(self)).items() if value}
        if vae is None and changes:
            name, value = next(iter(changes.items()))
            raise ConfigurationError(
                f"memory.{name}={value!r} has no effect on a model in pixel space, which has no decoder; leave it out"
            )
        if self.tile is not None and not any(kind.__name__ in _TILED for kind in type(vae).__mro__):
            raise ConfigurationError(
                f"memory.tile={self.tile} needs an AutoencoderKL, and this model has a {type(vae).__name__}; write "
                "memory.checkpoint_decoder=block instead"
            )

    def chunk(self, image_size: tuple[int, int]) -> int:
        """Return the number of images of a height and width that are decoded at a time."""
        height, width = image_size
        return self.decode_chunk or max(1, PIXELS // (height * width))

    def recomputes(self, chunks: int) -> bool:
        """Return whether the backward pass recomputes the decoder for this many chunks; tiles are recomputed singly."""
        if self.tile is not None:
            return False
        return chunks > 1 if self.checkpoint_decoder in (None, "block") else self.checkpoint_decoder is True


def decode(vae: Any, latents: Tensor, memory: Memory, image_size: tuple[int, int], call: Decode) -> Tensor:
    """Decode latents `z` to images `vae(z) / 2 + 1/2`.

    Args:
        vae: The autoencoder; `None` if latents are images in [-1, 1].
        latents: `(B, C, h, w)`, scaled for the autoencoder.
        memory: Options for chunks and recomputation.
        image_size: Height and width of the images.
        call: Function of the autoencoder and latents that returns images in [-1, 1].

    Returns:
        Images `(B, 3, H, W)` in the latents' dtype, in [0, 1] by convention and not clamped.
    """
    if vae is None:
        return latents / 2 + 0.5
    chunks = torch.split(latents, memory.chunk(image_size))
    recompute = memory.recomputes(len(chunks)) and torch.is_grad_enabled()
    images = [
        checkpoint(_decode, vae, part, memory, call, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _decode(vae, part, memory, call)
        for part in chunks
    ]
    return torch.cat(images) / 2 + 0.5


def _decode(vae: Any, latents: Tensor, memory: Memory, call: Decode) -> Tensor:
    dtype = next(vae.decoder.parameters()).dtype
    parts = _recomputed_blocks(vae, memory) if memory.tile is None else _recomputed_tiles(vae, memory, memory.tile)
    autocast = torch.is_autocast_enabled(latents.device.type) and memory.vae_dtype is None
    with torch.autocast(latents.device.type, enabled=autocast), parts:
        return call(vae, latents.to(dtype)).to(latents.dtype)


@contextmanager
def _recomputed_tiles(vae: Any, memory: Memory, size: int) -> Iterator[None]:
    """Within this context, an autoencoder decodes tiles, and each is recomputed in the backward pass."""
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    forward = vae.decoder.forward

    def decode_tile(latents: Tensor) -> Tensor:
        with _recomputed_blocks(vae, memory):
            images: Tensor = forward(latents)
        return images

    try:
        for name, value in zip(names, (True, size, size >> len(vae.config.block_out_channels) - 1), strict=True):
            setattr(vae, name, value)
        vae.decoder.forward = partial(_recomputed, decode_tile)
        yield
    finally:
        vars(vae).update(before)
        del vae.decoder.forward


@contextmanager
def _recomputed_blocks(vae: Any, memory: Memory) -> Iterator[None]:
    """Within this context, each block of the decoder is recomputed in the backward pass, if the options say so.

    Blocks are the innermost elements of the network's lists, such as its residual blocks; autoencoders of diffusers
    recompute at most whole levels, and not all of them do.
    """
    wanted = memory.checkpoint_decoder == "block" and torch.is_grad_enabled()
    blocks = list(_innermost(vae.decoder)) if wanted else []
    try:
        for block in blocks:
            block.forward = partial(_recomputed, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # the method of the class remains


def _innermost(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of lists that contain no lists themselves."""
    for container in network.modules():
        if isinstance(container, _LISTS):
            for element in filter(None, container):
                if not any(isinstance(each, _LISTS) for each in element.modules()) and "forward" not in vars(element):
                    yield element


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
