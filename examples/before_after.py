"""Generate images of the same captions and noise before and after fine-tuning, and measure them.

    python -m lightning_draft fit --config quickstart
    python -m examples.before_after --lora runs/quickstart/lora/best.safetensors --out examples/results/quickstart.png

The twelve pairs are not selected: the captions are shuffled with seed 0, the noise has seed 0, and the first twelve are
shown. The results are means over all captions with `--noises` noises each, and standard errors. The distance to the
clean image needs the emoji images (`python -m examples.emoji_model.data`).
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.emoji_model.evaluate import generate, mean_and_error, open_pipeline
from examples.emoji_model.truth import ReferencePSNR, SceneRecognized
from lightning_draft.assets import FOLDER
from lightning_draft.callbacks.image_grid import to_pil_image
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import Reward
from lightning_draft.rewards.quality import CleanFraction, ImageQuality

SHOWN = 12


def ordered(prompts: str) -> list[str]:
    """Return the captions of a list in the order of seed 0."""
    captions = [str(prompt) for prompt in read_prompts(prompts)]
    return [captions[i] for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()]


def rewards(data: Path) -> dict[str, Reward]:
    """Return the rewards that measure the images."""
    found: dict[str, Reward] = {
        "reward: log p(clean)": ImageQuality("emoji64-judge"),
        "evaluation classifier: log p(clean)": ImageQuality("emoji64-judge-eval"),
        "evaluation classifier: clean fraction": CleanFraction("emoji64-judge-eval"),
    }
    emoji_file = data / "emoji64.npz"
    if emoji_file.exists():
        found["truth: PSNR to the clean image (dB)"] = ReferencePSNR(str(emoji_file))
        found["truth: nearest image is the caption's"] = SceneRecognized(str(emoji_file))
    return found


def compare(sets: dict[str, Tensor], captions: list[str], data: Path) -> dict[str, dict[str, list[float]]]:
    """Return mean and standard error of each reward for every set, and of the paired differences from the first set."""
    figures = {}
    for name, reward in rewards(data).items():
        scores = {label: reward(images, captions) for label, images in sets.items()}
        first, *others = scores
        columns = scores | {f"{label} - {first}": scores[label] - scores[first] for label in others}
        figures[name] = {label: [round(x, 3) for x in mean_and_error(s)] for label, s in columns.items()}
    return figures


def grid(sets: dict[str, Tensor], captions: list[str], path: Path, zoom: int = 2) -> None:
    """Write the sets, each `(N, 3, H, W)`, side by side under their captions."""
    labels, models = " | ".join(sets), list(sets.values())
    side = models[0].shape[-1] * zoom
    width, height = len(models) * (side + 4) + 12, side + 26
    columns = 8 // len(models)
    canvas = Image.new("RGB", (columns * width + 8, -(-len(captions) // columns) * height + 6), (232, 232, 232))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, caption in enumerate(captions):
        left, top = 8 + i % columns * width, 4 + i // columns * height
        pen.text((left, top), f"{caption}   {labels}", fill=(30, 30, 30), font=font)
        for k, images in enumerate(models):
            canvas.paste(to_pil_image(images[i], side), (left + k * (side + 4), top + 18))
    canvas.save(path)


def main() -> None:
    """Write the figure and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, nargs="+", required=True)
    parser.add_argument("--labels", nargs="+", default=["before", "after"], help="of the base model and each file")
    parser.add_argument("--out", type=Path, required=True, help="PNG file; the results are written beside it as JSON")
    parser.add_argument("--model", default=str(FOLDER / "emoji64"))
    parser.add_argument("--prompts", default="emoji64_eval")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji"))
    arguments = parser.parse_args()
    captions = ordered(arguments.prompts)
    everything = captions * arguments.noises
    sets = {
        label: generate(open_pipeline(Path(arguments.model), lora), everything, guidance=1.0, steps=arguments.steps)
        for label, lora in zip(arguments.labels, (None, *arguments.lora), strict=True)
    }
    grid({label: x[:SHOWN] for label, x in sets.items()}, captions[:SHOWN], arguments.out)
    figures = compare(sets, everything, arguments.data)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
