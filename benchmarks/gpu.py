"""Seconds, peak memory and share of the GPU's measured bf16 peak of training steps of denoisers of real size.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --models sd15 sdxl --steps 20

The denoisers have the architectures of Stable Diffusion 1.5, Stable Diffusion XL and FLUX.1, random bf16 weights and
rank-8 adapters. There is no decoder and no text encoder. `plan` is the peak that `plan_step` predicts. The share is the
floating-point operations of the plan, divided by the time and by the FLOP/s of a large bf16 matrix product. Cases that
do not fit the GPU are reported as such, and a case that would start after `--minutes` is left out.

`--device cpu --tiny` runs the same code with tiny networks.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import common
from benchmarks.step_cost import synchronize
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import LoRA
from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.latents import pack, positions, unpack
from lightning_draft.models.lora import ATTENTION
from lightning_draft.plan import StepPlan, plan_step
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.schedules import RectifiedFlow, VariancePreserving
from lightning_draft.truncation import Full, LastK
from lightning_draft.weightless import shapes_only, without_weights

GIB = 2**30
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
TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        **common.SIZES["tiny"]["unet"],
        "block_out_channels": (8,),
        "down_block_types": CROSS[:1],
        "up_block_types": CROSS[1:],
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


@dataclass(frozen=True)
class Case:
    """A setting of the training step."""

    name: str
    k: int | None = 1
    options: dict[str, Any] = field(default_factory=dict)
    compile: bool = False


CASES = [
    Case("K = 1, nothing recomputed", options={"checkpointing": "none"}),
    Case("K = 1, step recomputed", options={"checkpointing": "step"}),
    Case("K = 1, blocks recomputed", options={"checkpointing": "block"}),
    Case("full, steps recomputed", None, {"checkpointing": "step"}),
    Case("full, both recomputed", None, {"checkpointing": "both"}),
    Case("K = 1, nothing recomputed, compiled", options={"checkpointing": "none"}, compile=True),
]


class Denoiser(DiffusionModel):
    """A denoiser with random weights and adapters, zeros as text, and the first latent channels as image.

    Args:
        name: One of `ARCHITECTURES`.
        config: Options of its network.
        device: Device of the network.
        compiled: Whether the network is compiled.
    """

    def __init__(self, name: str, config: dict[str, Any], device: str, compiled: bool = False) -> None:
        super().__init__()
        self.is_flux = name == "flux"
        diffusion = VariancePreserving.from_table(DDIMScheduler().alphas_cumprod)
        self.schedule = RectifiedFlow() if self.is_flux else diffusion
        self.prediction = "flow" if self.is_flux else "epsilon"
        kind: Any = FluxTransformer2DModel if self.is_flux else UNet2DConditionModel
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # a float32 FLUX.1 would need 48 GB
        try:
            with shapes_only(), torch.device(device):
                self.network = kind(**config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(default)
        with shapes_only():
            LoRA(rank=8, seed=0).attach(self.network, ATTENTION)
        self.side = self.network.config.get("sample_size") or (128 if config is ARCHITECTURES[name] else 8)
        if compiled:
            self.network.compile()

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self.network

    @property
    def _weight(self) -> Tensor:
        return next(self.network.parameters())

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
        like = self._weight
        return Conditioning({name: like.new_zeros(count, *size) for name, size in widths.items()})

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample float32 latents."""
        shape = (batch_size, 16 if self.is_flux else 4, self.side, self.side)
        return torch.randn(shape, generator=generator, device=self._weight.device, dtype=torch.float32)

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


def _checkpoint(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)


def build(name: str, case: Case, configs: dict[str, dict[str, Any]], device: str, steps: int) -> DraftModule:
    """Build the method of a case."""
    model = Denoiser(name, configs[name], device, case.compile)
    sampler = FlowEuler(steps) if model.is_flux else DDIM(steps)
    truncation = Full() if case.k is None else LastK(case.k)
    return DraftModule(model, ColorTarget(), sampler, truncation, **case.options)


def predicted(name: str, case: Case, configs: dict[str, dict[str, Any]], steps: int) -> StepPlan:
    """Return the plan of a case."""
    with without_weights():
        return plan_step(build(name, case, configs, "cpu", steps), ["a cat"], {})


def seconds(module: DraftModule, device: str, repeats: int) -> float:
    """Return the median seconds of a training step, after one that is not timed."""
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-6)
    times = []
    for _ in range(1 + repeats):
        synchronize(torch.device(device))
        start = time.perf_counter()
        module.loss_and_logs(["a cat"])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
    return median(times[1:])


def matmul_flops(device: str, size: int) -> float:
    """Return the FLOP/s of a bf16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        synchronize(torch.device(device))
        start = time.perf_counter()
        a @ a
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def row(name: str, case: Case, arguments: argparse.Namespace, flops: float) -> list[str]:
    """Measure a case."""
    configs, device = TINY if arguments.tiny else ARCHITECTURES, arguments.device
    plan = predicted(name, case, configs, arguments.steps)
    found = [name, case.name, f"{plan.peak / GIB:.2f}"]
    cuda = torch.device(device).type == "cuda"
    gc.collect()
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        taken = seconds(build(name, case, configs, device, arguments.steps), device, arguments.repeats)
    except torch.OutOfMemoryError:
        return [*found, "does not fit", "", ""]
    peak = f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}" if cuda else "not measured"
    return [*found, peak, f"{taken:.3f}", f"{plan.total_flops / taken / flops:.1%}"]


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--models", nargs="*", default=[], help="only these: sd15, sdxl, flux")
    parser.add_argument("--cases", nargs="*", default=[], help="only those whose name starts with one of these")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps T")
    parser.add_argument("--repeats", type=int, default=3, help="timed training steps")
    parser.add_argument("--minutes", type=float, default=10.0, help="no case starts later")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; run it on a machine with one, or add --device cpu --tiny to try the benchmark")
    common.quiet()
    start, flops = time.monotonic(), matmul_flops(arguments.device, 256 if arguments.tiny else 8192)
    names = arguments.models or list(TINY if arguments.tiny else ARCHITECTURES)
    chosen, rows = tuple(arguments.cases) or ("",), []
    for name in names:
        for case in (each for each in CASES if each.name.startswith(chosen)):
            late = time.monotonic() - start > 60 * arguments.minutes
            rows.append([name, case.name, "", "left out", "", ""] if late else row(name, case, arguments, flops))
    head = ["denoiser", "case", "plan, GiB", "peak, GiB", "s / step", "share of bf16 peak"]
    title = f"T = {arguments.steps}, batch 1, {arguments.device}, {flops / 1e12:.3g} TFLOP/s in a bf16 matrix product."
    common.show(f"{title}\n\n{common.table(head, rows)}", arguments.output)


if __name__ == "__main__":
    main()
