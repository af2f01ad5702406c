"""Evaluate the shipped models: prompt accuracy and degraded fraction of the pipeline, retrieval accuracy of the CLIP.

    python -m examples.emoji_model.evaluate --sheet examples/results/emoji64_samples.png
    python -m examples.emoji_model.evaluate --steps 10 --guidance 1 --lora runs/quickstart/lora/best.safetensors

Subjects and compositions are recognized by the nearest clean image (`truth.SceneRecognized`), degraded images by the
classifier for evaluation. Standard errors are those of the mean over images.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from examples.emoji_model.compositions import Scene, render
from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.degradations import degrade_all
from examples.emoji_model.mixture import new_pairs, scenes
from examples.emoji_model.truth import ReferencePSNR, SceneRecognized
from lightning_draft.callbacks.image_grid import to_pil_image
from lightning_draft.rewards.quality import CleanFraction, ImageQuality


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline, captions: list[str], guidance: float, steps: int = 20, seed: int = 0
) -> Tensor:
    """Sample one image per caption, `(N, 3, S, S)` in [0, 1]; the noise depends only on the seed and the position."""
    shape = (pipe.unet.config.in_channels, *(pipe.unet.config.sample_size,) * 2)
    noise = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(seed))
    images = [
        pipe(
            captions[i : i + 32],
            latents=noise[i : i + 32],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        for i in range(0, len(captions), 32)
    ]
    return torch.cat(images)


def open_pipeline(folder: Path, lora: Path | None = None) -> StableDiffusionPipeline:
    """Open a pipeline in float32, with adapters if a file is given."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def mean_and_error(scores: Tensor) -> tuple[float, float]:
    """Return the mean of `(N,)` and its standard error."""
    return scores.mean().item(), (scores.std() / len(scores) ** 0.5).item()


@torch.no_grad()
def measure(images: Tensor, captions: list[str], data: Path, assets: Path) -> dict[str, Tensor]:
    """Return scores `(N,)` of images `(N, 3, 64, 64)` of `captions`, by name."""
    file = str(prepare(data))
    return {
        "recognized": SceneRecognized(file)(images, captions),
        "PSNR to the clean image": ReferencePSNR(file)(images, captions),
        "reward": ImageQuality(str(assets / "emoji64-judge"))(images, captions),
        "evaluation classifier": ImageQuality(str(assets / "emoji64-judge-eval"))(images, captions),
        "degraded": 1 - CleanFraction(str(assets / "emoji64-judge-eval"))(images, captions),
    }


@torch.no_grad()
def autoencoder_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the mean PSNR of decoded images, in dB."""
    decoded = torch.cat([vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5 for x in images.split(32)])
    errors = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
    return -10 * errors.log10().mean().item()


@torch.no_grad()
def retrieval_rate(folder: Path, batch: Tensor, captions: list[str]) -> float:
    """Return the fraction of images whose caption the CLIP ranks first among `captions`."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    images = [to_pil_image(image, 1) for image in batch]
    inputs = processor(text=captions, images=images, return_tensors="pt", padding="max_length", truncation=True)
    return (clip(**inputs).logits_per_image.argmax(1) == torch.arange(len(captions))).float().mean().item()


def sheet(images: Tensor, path: Path, columns: int = 8, zoom: int = 3) -> None:
    """Write images as one PNG with `columns` images per row."""
    big = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    rows = [torch.cat(list(row), 2) for row in big.split(columns)]
    to_pil_image(torch.cat(rows, 1), 1).save(path)


def chosen_scenes(emoji: Emoji, count: int) -> dict[str, list[Scene]]:
    """Return up to `count` scenes of each kind, by a fixed random order."""
    generator = torch.Generator().manual_seed(0)
    return {
        kind: [some[i] for i in torch.randperm(len(some), generator=generator)[:count].tolist()]
        for kind, some in {**scenes(emoji), "new pair": new_pairs()}.items()
    }


def static_figures(pipe: StableDiffusionPipeline, emoji: Emoji, assets: Path) -> Mapping[str, float]:
    """Measure the autoencoder and the CLIP on emoji images."""
    known = scenes(emoji)
    singles = torch.stack([render(scene, emoji) for scene in known["single"]])
    composed = [scene for kind in ("two", "ground", "pair") for scene in known[kind]]
    images = torch.stack([render(scene, emoji) for scene in composed])
    torch.manual_seed(0)
    return {
        "autoencoder, the model's emoji (dB)": autoencoder_psnr(pipe.vae, singles),
        "autoencoder, the same degraded (dB)": autoencoder_psnr(pipe.vae, degrade_all(singles)),
        "autoencoder, compositions (dB)": autoencoder_psnr(pipe.vae, images),
        "autoencoder, all emoji (dB)": autoencoder_psnr(pipe.vae, emoji.images[::4]),
        "CLIP retrieval, the model's emoji": retrieval_rate(
            assets / "emoji64-clip", singles, [s.caption for s in known["single"]]
        ),
        "CLIP retrieval, compositions": retrieval_rate(assets / "emoji64-clip", images, [s.caption for s in composed]),
    }


def main() -> None:
    """Print the results as JSON, and optionally write a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--assets", type=Path, default=Path("lightning_draft/assets"))
    parser.add_argument("--count", type=int, default=240, help="captions of each kind")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lora", type=Path, help="LoRA file to load into the diffusers pipeline")
    parser.add_argument("--sheet", type=Path, help="PNG with 32 single emoji and 8 images of each other kind")
    parser.add_argument("--no-static", action="store_true", help="do not measure the autoencoder and the CLIP")
    arguments = parser.parse_args()
    emoji = Emoji.load(prepare(arguments.data))
    pipe = open_pipeline(arguments.assets / "emoji64", arguments.lora)
    figures: dict[str, object] = {}
    samples = []
    for kind, some in chosen_scenes(emoji, arguments.count).items():
        captions = [scene.caption for scene in some]
        images = generate(pipe, captions, arguments.guidance, arguments.steps)
        samples.append(images[: 32 if kind == "single" else 8])
        scores = measure(images, captions, arguments.data, arguments.assets)
        figures[f"{kind} ({len(captions)})"] = {k: [round(x, 3) for x in mean_and_error(v)] for k, v in scores.items()}
        print(kind, json.dumps(figures[f"{kind} ({len(captions)})"]), flush=True)
    if arguments.sheet:
        sheet(torch.cat(samples), arguments.sheet, zoom=2)
    if not arguments.no_static:
        figures.update({k: round(v, 3) for k, v in static_figures(pipe, emoji, arguments.assets).items()})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
