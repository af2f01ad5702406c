"""Measure what ships: does the pipeline draw what it is told, and does the CLIP know what it sees.

    python -m examples.emoji_model.evaluate --sheet examples/emoji_model/samples.png
    python -m examples.emoji_model.evaluate --steps 10 --guidance 1 --lora runs/quickstart/lora/best.safetensors

A drawing counts as right where the nearest training picture (L2 over the 32x32 pixels) carries the prompted name, in
either style.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.nearest import NearestPicture
from lightning_draft.data import read_prompts


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, captions: list[str], guidance: float, steps: int = 20, seed: int = 0) -> Tensor:
    """Sample one picture a caption, `(N, 3, 32, 32)` in [0, 1]."""
    shape = (pipe.unet.config.in_channels, *(pipe.unet.config.sample_size,) * 2)
    noise = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(seed))
    pictures = [
        pipe(
            captions[i : i + 32],
            latents=noise[i : i + 32],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        for i in range(0, len(captions), 32)
    ]
    return torch.cat(pictures)


@torch.no_grad()
def retrieval_rate(folder: Path, emoji: Emoji, rows: list[int]) -> float:
    """Share of the pictures in `rows` whose caption the CLIP ranks first among the captions of `rows`."""
    clip, processor = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
        CLIPProcessor.from_pretrained(folder),
    )
    captions = [emoji.captions[i] for i in rows]
    pictures = [Image.fromarray((emoji.images[i].permute(1, 2, 0) * 255).round().byte().numpy()) for i in rows]
    inputs = processor(text=captions, images=pictures, return_tensors="pt", padding="max_length", truncation=True)
    return (clip(**inputs).logits_per_image.argmax(1) == torch.arange(len(rows))).float().mean().item()


def sheet(pictures: Tensor, path: Path, columns: int = 8, zoom: int = 3) -> None:
    """Write `pictures` as one PNG, `columns` a row."""
    big = pictures.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    rows = [torch.cat(list(row), 2) for row in big.split(columns)]
    Image.fromarray((torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()).save(path)


def main() -> None:
    """Print the figures as JSON, and write a contact sheet where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--assets", type=Path, default=Path("lightning_draft/assets"))
    parser.add_argument("--count", type=int, default=256, help="how many training captions to draw")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora", type=Path, help="load these adapters into the pipeline, by diffusers")
    parser.add_argument("--sheet", type=Path, help="PNG of 64 drawings")
    arguments = parser.parse_args()
    emoji = Emoji.load(prepare(arguments.data))
    drawn = torch.nonzero(emoji.drawn & ~emoji.held_out).squeeze(1)
    chosen = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[: arguments.count]].tolist()
    unseen = torch.nonzero(emoji.held_out).squeeze(1).tolist()
    pipe = StableDiffusionPipeline.from_pretrained(arguments.assets / "emoji", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if arguments.lora:
        pipe.load_lora_weights(arguments.lora)
    lists = {
        "drawn right": [emoji.captions[row] for row in chosen],
        "drawn right, unseen pairs": [emoji.captions[row] for row in unseen],
        "drawn right, bare names": [str(prompt) for prompt in read_prompts("emoji_names")] * 4,
    }
    judge = NearestPicture(str(prepare(arguments.data)))
    pictures = {name: draw(pipe, prompts, arguments.guidance, arguments.steps) for name, prompts in lists.items()}
    if arguments.sheet:
        sheet(pictures["drawn right"][:64], arguments.sheet)
    clip = arguments.assets / "emoji-clip"
    figures = {name: judge(drawn, lists[name]).mean().item() for name, drawn in pictures.items()}
    figures["retrieved by the CLIP, of all captions"] = retrieval_rate(clip, emoji, list(range(len(emoji.images))))
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
