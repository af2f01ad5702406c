"""Pack what `train.py` left into what ships: a diffusers pipeline, a transformers CLIP, and their captions.

python -m examples.emoji_model.export --folder runs/emoji --out lightning_draft/assets
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from examples.emoji_model import parts
from examples.emoji_model.data import Emoji, prepare


def weights(checkpoint: Path, prefix: str = "network.") -> dict[str, Tensor]:
    """What lies under `prefix` in a training checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def standardised_autoencoder(checkpoint: Path, emoji: Emoji) -> AutoencoderKL:
    """The autoencoder, with its latents' mean and deviation folded into its two 1x1 convolutions.

    The latents of the pictures then have mean 0 and deviation 1 in every channel, and the scaling factor is 1.
    """
    vae = parts.autoencoder()
    vae.load_state_dict(weights(checkpoint))
    vae.eval().requires_grad_(False)
    latents = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in emoji.images.split(128)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    inward, outward = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    inward.weight[:channels] /= std.view(-1, 1, 1, 1)
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.bias[channels:] -= 2 * std.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= std.view(1, -1, 1, 1)
    return vae


def pipeline(folder: Path, emoji: Emoji, source: Path | None = None) -> StableDiffusionPipeline:
    """The text-to-image pipeline, all parts real.

    Args:
        folder: Of the trainings.
        emoji: The pictures, by which the latents are standardised.
        source: The pipeline whose autoencoder and tokenizer the denoiser was trained on, if not on those of `folder`.
    """
    if source is None:
        vae = standardised_autoencoder(folder / "vae" / "last.ckpt", emoji)
    else:
        vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained((folder if source is None else source) / "tokenizer")
    state = weights(folder / "unet" / "last.ckpt", "average.module.")
    networks = {"unet": parts.unet(), "text": parts.text_encoder(words)}
    for name, network in networks.items():
        network.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=networks["text"].eval(),
        tokenizer=words,
        unet=networks["unet"].eval(),
        scheduler=parts.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_clip(folder: Path, out: Path) -> None:
    """Write the small CLIP in transformers' own format."""
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    clip = parts.clip(words)
    clip.load_state_dict(weights(folder / "clip" / "last.ckpt"))
    clip.half().save_pretrained(out)
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, words).save_pretrained(out)


def export_prompts(emoji: Emoji, out: Path) -> None:
    """Write the captions that the pipeline was trained to draw, those held out from it, and some bare names.

    A bare name is a caption without its style, which the pipeline never saw; Twemoji's caption is beside it.
    """
    for name, chosen in {"emoji": emoji.drawn & ~emoji.held_out, "emoji_unseen": emoji.held_out}.items():
        captions = [emoji.captions[row] for row in torch.nonzero(chosen).squeeze(1).tolist()]
        (out / f"{name}.txt").write_text("\n".join(sorted(captions)) + "\n")
    twemoji = [row for row in torch.nonzero(emoji.drawn & ~emoji.held_out).squeeze(1) if emoji.styles[row] == "twemoji"]
    names = sorted(emoji.names[row] for row in twemoji)
    for list_name, some in {"emoji_names": names[::6], "emoji_all_names": names}.items():
        lines = ["prompt,caption", *(f"{name},twemoji {name}" for name in some)]
        (out / f"{list_name}.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Export everything that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--pipeline", type=Path, help="what the denoiser was trained on, if it was given to `train`")
    parser.add_argument("--out", type=Path, default=Path("lightning_draft/assets"))
    parser.add_argument("--prompts", type=Path, default=Path("lightning_draft/prompts"))
    arguments = parser.parse_args()
    emoji = Emoji.load(prepare(arguments.folder))
    export_prompts(emoji, arguments.prompts)
    if (arguments.folder / "unet" / "last.ckpt").exists():
        pipeline(arguments.folder, emoji, arguments.pipeline).to(torch.float16).save_pretrained(arguments.out / "emoji")
    if (arguments.folder / "clip" / "last.ckpt").exists():
        export_clip(arguments.folder, arguments.out / "emoji-clip")


if __name__ == "__main__":
    main()
