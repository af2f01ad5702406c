"""Decoding of latents into images, whole or in chunks."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_draft.arguments import at_least

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Memory:
    """Options that lower the peak memory of the decoder, or set its precision.

    Args:
        decode_chunk: Decode this many images at a time; by default all at once.
        checkpoint_decoder: Recompute the decoder's activations in the backward pass, chunk by chunk.
        vae_dtype: Precision of the autoencoder's weights and activations, independent of the Trainer's precision; by
            default the model's `dtype`.
    """

    decode_chunk: int | None = None
    checkpoint_decoder: bool = False
    vae_dtype: Precision | None = None

    def __post_init__(self) -> None:
        if self.decode_chunk is not None:
            at_least("memory.decode_chunk", self.decode_chunk, 1, "leave it out to decode all images at once")


def decode(vae: Any, latents: Tensor, memory: Memory) -> Tensor:
    """Decode latents `z` to images `vae(z) / 2 + 1/2`.

    Args:
        vae: The autoencoder; `None` if latents are images in [-1, 1].
        latents: `(B, C, h, w)`, scaled for the autoencoder.
        memory: Options for chunks and recomputation.

    Returns:
        Images `(B, 3, H, W)` in the latents' dtype, in [0, 1] by convention and not clamped.
    """
    if vae is None:
        return latents / 2 + 0.5
    recompute = memory.checkpoint_decoder and torch.is_grad_enabled()
    images = [
        checkpoint(_decode, vae, part, memory, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _decode(vae, part, memory)
        for part in torch.split(latents, memory.decode_chunk or max(1, len(latents)))
    ]
    return torch.cat(images) / 2 + 0.5


def _decode(vae: Any, latents: Tensor, memory: Memory) -> Tensor:
    dtype = next(vae.decoder.parameters()).dtype
    autocast = torch.is_autocast_enabled(latents.device.type) and memory.vae_dtype is None
    with torch.autocast(latents.device.type, enabled=autocast):
        images: Tensor = vae.decode(latents.to(dtype), return_dict=False)[0]
    return images.to(latents.dtype)
