"""Recomputation of the decoder by block: the same images and gradients, and less memory, for any autoencoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKLQwenImage, AutoencoderTiny
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Memory
from lightning_draft.models.decoder import Decode, decode
from lightning_draft.models.latents import decode_frame, decode_image
from lightning_draft.plan import Tracker
from tests.tiny_autoencoders import autoencoder


def deep_compression() -> AutoencoderDC:
    """The class of Sana's, for which diffusers has no gradient checkpointing."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(4, 4),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def qwen() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=3, temperal_downsample=[True])


AUTOENCODERS: dict[str, tuple[Callable[[], Any], Decode]] = {
    "AutoencoderKL": (lambda: autoencoder(4, layers_per_block=3), decode_image),
    "without attention": (
        lambda: autoencoder(4, layers_per_block=3, mid_block_add_attention=False),
        decode_image,
    ),
    "AutoencoderDC": (deep_compression, decode_image),
    "AutoencoderKLQwenImage": (qwen, decode_frame),
}


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_recomputed_blocks_give_the_same_gradient_with_less_memory(name: str, chunk: int) -> None:
    torch.manual_seed(0)
    build, call = AUTOENCODERS[name]
    vae = build().requires_grad_(False).eval()
    z = torch.randn(2, 4, 16, 16)

    def measured(memory: Memory) -> tuple[int, Tensor, Tensor]:
        latents = z.clone().requires_grad_()
        with Tracker() as live:
            images = decode(vae, latents, memory, (32, 32), call)
            gradient = torch.autograd.grad(images.square().sum(), latents)[0]
        return live.peak, images.detach(), gradient

    (by_block, *ours), (whole, *theirs) = (
        measured(Memory(decode_chunk=chunk, checkpoint_decoder=value)) for value in ("block", True)
    )
    assert all(map(torch.equal, ours, theirs))
    assert by_block < 0.75 * whole
    assert not any("forward" in vars(module) for module in vae.modules())


def test_sampling_recomputes_nothing() -> None:
    vae = autoencoder(4)
    with torch.no_grad():
        images = decode(vae, torch.zeros(1, 4, 4, 4), Memory(checkpoint_decoder="block"), (8, 8), decode_image)
    assert torch.equal(images, vae.decode(torch.zeros(1, 4, 4, 4)).sample.detach() / 2 + 0.5)


@pytest.mark.parametrize("recomputed", [None, "block"])
def test_recomputed_tiles_give_the_images_and_the_gradient_of_tiled_decoding(recomputed: Any) -> None:
    """By diffusers' own method, which stores the activations of all tiles."""
    torch.manual_seed(0)
    vae = autoencoder(4, layers_per_block=3).requires_grad_(False).eval()
    z = torch.randn(2, 4, 32, 48)

    def measured(memory: Memory) -> tuple[int, Tensor, Tensor]:
        latents = z.clone().requires_grad_()
        with Tracker() as live:
            images = decode(vae, latents, memory, (64, 96), decode_image)
            gradient = torch.autograd.grad(images.square().sum(), latents)[0]
        return live.peak, images.detach(), gradient

    by_tile, *ours = measured(Memory(decode_chunk=1, tile=32, checkpoint_decoder=recomputed))
    assert not vae.use_tiling
    assert "forward" not in vars(vae.decoder)
    whole, images, _ = measured(Memory(decode_chunk=1, checkpoint_decoder=True))
    assert by_tile < (0.5 if recomputed is None else 0.4) * whole
    assert not torch.allclose(ours[0], images, atol=1e-4)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    stored, *theirs = measured(Memory(decode_chunk=1, checkpoint_decoder=False))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert stored > by_tile


def test_tiles_that_are_not_possible_are_rejected() -> None:
    """An `AutoencoderTiny` has tiles, too, but of small sizes it decodes only the first to an image."""
    Memory(tile=64).check(autoencoder(4))
    with pytest.raises(ConfigurationError, match="memory.tile=100 must be a multiple of 32 pixels; write 512"):
        Memory(tile=100)
    with pytest.raises(ConfigurationError, match="memory.tile=64 needs an AutoencoderKL, .* AutoencoderDC; write"):
        Memory(tile=64).check(deep_compression())
    with pytest.raises(ConfigurationError, match="memory.tile=32 needs an AutoencoderKL, .* AutoencoderTiny; write"):
        Memory(tile=32).check(AutoencoderTiny())
