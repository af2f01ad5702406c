"""Denoisers with the architectures of Stable Diffusion 1.5, Stable Diffusion XL and FLUX.1, and random weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import common
from lightning_draft.models import LoRA
from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.latents import pack, positions, unpack
from lightning_draft.models.lora import ATTENTION
from lightning_draft.models.quantization import Quantization, replace_linear_layers
from lightning_draft.schedules import RectifiedFlow, VariancePreserving
from lightning_draft.weightless import is_without_weights, shapes_only

CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", CROSS[0], CROSS[0]),
        "up_block_types": (CROSS[1], CROSS[1], "UpBlock2D"),
        "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816,
        **TEXT_TIME,
    },
    "flux": {"guidance_embeds": True},
}
_SMALL_UNET = {
    **common.SIZES["tiny"]["unet"],
    "block_out_channels": (8,),
    "down_block_types": CROSS[:1],
    "up_block_types": CROSS[1:],
}
TINY: dict[str, dict[str, Any]] = {
    "sd15": _SMALL_UNET,
    "sdxl": {
        **_SMALL_UNET,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816,
        **TEXT_TIME,
    },
    "flux": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    },
}


class Denoiser(DiffusionModel):
    """A bf16 denoiser with random weights and adapters, zeros as text, and the first latent channels as image.

    Args:
        name: One of `ARCHITECTURES`.
        config: Options of its network.
        device: Device of the network.
        quantization: `torchao-int8`, `bitsandbytes-nf4`, or `None` for no quantization.
        backend: Compiler backend; `None` if the network is not compiled.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        device: str,
        quantization: Quantization | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.is_flux = name == "flux"
        diffusion = VariancePreserving.from_table(DDIMScheduler().alphas_cumprod)
        self.schedule = RectifiedFlow() if self.is_flux else diffusion
        self.prediction = "flow" if self.is_flux else "epsilon"
        kind: Any = FluxTransformer2DModel if self.is_flux else UNet2DConditionModel
        with _default_dtype(torch.bfloat16), shapes_only(), torch.device(device):
            self.network = kind(**config).requires_grad_(False).eval()
        quantize(self.network, quantization)
        with shapes_only():
            LoRA(rank=8, seed=0).attach(self.network, ATTENTION)
        self.side = self.network.config.get("sample_size") or (128 if config is ARCHITECTURES[name] else 8)
        if backend is not None:
            self.network.compile(backend=backend)

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        network: nn.Module = self.network
        return network

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.denoiser.parameters()).device

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """Set whether blocks are recomputed."""
        if enabled:
            self.network.enable_gradient_checkpointing(_checkpoint)
        else:
            self.network.disable_gradient_checkpointing()
        self.block_checkpointing = enabled

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return zeros."""
        config, count = self.network.config, len(prompts)
        if self.is_flux:
            widths = {"text": (512, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}
        else:
            widths = {"text": (77, config.cross_attention_dim)}
            if config.addition_embed_type == "text_time":
                widths |= {"text_embeds": (1280,), "time_ids": (6,)}
        dtype, device = torch.bfloat16, self.device
        return Conditioning({n: torch.zeros(count, *size, dtype=dtype, device=device) for n, size in widths.items()})

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample float32 latents."""
        shape = (batch_size, 16 if self.is_flux else 4, self.side, self.side)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Call the network in bf16."""
        given, dtype = conditioning.tensors, torch.bfloat16
        time = torch.full((len(x),), t, device=x.device)
        if not self.is_flux:
            added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
            output = self.network(x.to(dtype), time, given["text"], added_cond_kwargs=added, return_dict=False)[0]
            return output.to(x.dtype)  # type: ignore[no-any-return]
        half = self.side // 2
        output = self.network(
            hidden_states=pack(x.to(dtype)),
            timestep=time,
            guidance=torch.full_like(time, 3.5),
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["text"],
            txt_ids=torch.zeros(given["text"].shape[1], 3, device=x.device),
            img_ids=positions(half, half, x.device),
            return_dict=False,
        )[0]
        return unpack(output, self.side, self.side).to(x.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the first three channels."""
        return latents[:, :3] / 2 + 0.5


def quantize(network: nn.Module, kind: Quantization | None) -> None:
    """Quantize the linear layers of a network in place.

    Args:
        network: The network, on its device.
        kind: `torchao-int8`, `bitsandbytes-nf4`, or `None` to do nothing.
    """
    if kind is not None and is_without_weights():
        replace_linear_layers(network, kind)
    elif kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig())
    elif kind == "bitsandbytes-nf4":
        for parent in list(network.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, _to_nf4(layer))


def _to_nf4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    quantized: nn.Module = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.detach()
    quantized.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(weight.device)
    quantized.bias = layer.bias
    return quantized


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context new tensors have a dtype; a float32 FLUX.1 would need 48 GB."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _checkpoint(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)
