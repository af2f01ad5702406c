"""Helpers of the benchmarks: models with a given size, and tables."""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from lightning.pytorch.utilities import disable_possible_user_warnings
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lightning_draft.assets import FOLDER
from lightning_draft.models import Guidance, LoRA, StableDiffusion

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "unet": {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": {"block_out_channels": (8, 8), "norm_num_groups": 4},
        "text": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    },
    "small": {
        "unet": {
            "sample_size": 32,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        "vae": {"block_out_channels": (8, 16), "norm_num_groups": 8},
        "text": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    },
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        "text": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    },
}
"""Architectures with random weights: one for tests, a small one, and that of Stable Diffusion 1.5."""


def add_arguments(parser: argparse.ArgumentParser, steps: int, batch: int) -> None:
    """Add the arguments of every benchmark."""
    parser.add_argument(
        "--model", default="small", help="small, sd15 (random weights), or anything that StableDiffusion opens"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="dtype of the frozen parts: float32, bfloat16 or float16")
    parser.add_argument("--steps", type=int, default=steps, help="sampling steps T")
    parser.add_argument("--batch", type=int, default=batch, help="prompts per step")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="with 1 (no guidance) g = 1, else g = 2")
    parser.add_argument("--output", type=Path, help="also write the page to this file")


def open_model(arguments: argparse.Namespace, **options: Any) -> StableDiffusion:
    """Open the model that the arguments name, with rank-8 adapters."""
    options = {"dtype": arguments.dtype, "guidance": Guidance(arguments.guidance_scale), **options}
    lora = LoRA(rank=8, seed=0)
    if arguments.model not in SIZES:
        return StableDiffusion(arguments.model, lora=lora, **options)
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(Path(folder), arguments.model)
        return StableDiffusion(folder, lora=lora, **options)


def write_pipeline(folder: Path, size: str) -> None:
    """Write a Stable Diffusion pipeline with random weights to a folder.

    Args:
        folder: The folder.
        size: One of `SIZES`.
    """
    write_networks(folder, **SIZES[size])


def write_networks(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Write a Stable Diffusion pipeline with random weights from the options of its networks."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "emoji64" / "tokenizer")
    tokenizer.model_max_length = 77
    levels = len(vae["block_out_channels"])
    encoder = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **text,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **vae,
        ),
        text_encoder=CLIPTextModel(encoder),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if text["hidden_size"] > 512:
        pipeline.to(torch.bfloat16)  # half of the size on disk; the weights are random
    pipeline.save_pretrained(folder)


def quiet() -> None:
    """Suppress Lightning's notices."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    disable_possible_user_warnings()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for text in (".*eval mode.*", ".*many workers.*", ".*no logger.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", text)


def describe(arguments: argparse.Namespace, model: StableDiffusion) -> str:
    """Describe the measured model and the machine in one line."""
    cuda = torch.device(arguments.device).type == "cuda"
    where = torch.cuda.get_device_name(arguments.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    size = sum(value.numel() for value in model.unet.parameters()) / 1e6
    height, width = model.latent_shape[1:]
    g = 1 if arguments.guidance_scale == 1 else 2
    return (
        f"{arguments.model}: denoiser of {size:.1f} M parameters on {height}x{width} latents, {arguments.dtype}; "
        f"batch {arguments.batch}, g = {g}; {where}, torch {torch.__version__}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns, of which the first is text and the others are numbers."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        """Return one row, the first cell to the left and the others to the right."""
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(head), f"| {' | '.join(rule)} |", *map(line, rows)])


def show(page: str, output: Path | None) -> None:
    """Print a page, and write it to a file if one is given."""
    print(page)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page + "\n")
