"""Export the trained models as shipped: a diffusers pipeline, a transformers CLIP, two classifiers, and prompt lists.

python -m examples.emoji_model.export --folder runs/emoji --out lightning_draft/assets
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from examples.emoji_model import parts
from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.mixture import new_pairs, scenes, split

SHIPPED = Path("lightning_draft/assets")
JUDGES = {"convnet": "emoji64-judge", "resnet": "emoji64-judge-eval"}


def weights(checkpoint: Path, prefix: str = "network.") -> dict[str, Tensor]:
    """Return the tensors under `prefix` in a training checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def autoencoder(checkpoint: Path) -> AutoencoderKL:
    """Return the trained autoencoder, frozen; its scaling factor gives the latents a standard deviation of 1."""
    std = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]["latent_std"].item()
    vae = parts.autoencoder(1 / std)
    vae.load_state_dict(weights(checkpoint))
    return vae.eval().requires_grad_(False)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """Return the text-to-image pipeline trained in `folder`."""
    words = CLIPTokenizer.from_pretrained(folder / "unet" / "tokenizer")
    state = weights(folder / "unet" / "last.ckpt", "average.module.")
    networks = {"unet": parts.unet(), "text": parts.text_encoder(words)}
    for name, network in networks.items():
        network.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
    return StableDiffusionPipeline(
        vae=autoencoder(folder / "vae" / "last.ckpt"),
        text_encoder=networks["text"].eval(),
        tokenizer=words,
        unet=networks["unet"].eval(),
        scheduler=parts.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def use_published_names(file: Path) -> None:
    """Rename the weights of a CLIP text encoder to the names of published checkpoints, which start with `text_model.`.

    Newer releases of transformers write shorter names, which older releases ignore.
    """
    named = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def export_clip(folder: Path, out: Path) -> None:
    """Write the small CLIP in the format of transformers."""
    words = CLIPTokenizer.from_pretrained(folder / "clip" / "tokenizer")
    clip = parts.clip(words)
    clip.load_state_dict(weights(folder / "clip" / "last.ckpt"))
    clip.half().save_pretrained(out)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(processor, words).save_pretrained(out)


def export_prompts(emoji: Emoji, out: Path) -> None:
    """Write the captions of single emoji, compositions and new pairs for fine-tuning, and of others to evaluate."""
    known = scenes(emoji)
    compositions = [*known["two"], *known["ground"], *known["pair"]]
    lists = {"emoji64": known["single"], "emoji64_scenes": compositions, "emoji64_pairs": new_pairs()}
    for name, some in lists.items():
        for suffix, captions in zip(("", "_eval"), split(some), strict=True):
            (out / f"{name}{suffix}.txt").write_text("\n".join(captions) + "\n")


def main() -> None:
    """Export all trained parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--prompts", type=Path, default=Path("lightning_draft/prompts"))
    arguments = parser.parse_args()
    export_prompts(Emoji.load(prepare(arguments.folder)), arguments.prompts)
    if (arguments.folder / "unet" / "last.ckpt").exists():
        trained = pipeline(arguments.folder)
        trained.to(torch.float16).save_pretrained(arguments.out / "emoji64")
        use_published_names(arguments.out / "emoji64" / "text_encoder" / "model.safetensors")
    if (arguments.folder / "clip" / "last.ckpt").exists():
        export_clip(arguments.folder, arguments.out / "emoji64-clip")
    for kind, name in JUDGES.items():
        if (arguments.folder / "judges" / kind).exists():
            shutil.copytree(arguments.folder / "judges" / kind, arguments.out / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
