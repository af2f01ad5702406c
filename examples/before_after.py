"""Draw the same captions from the same noise before and after fine-tuning, as one picture, and measure both.

    python -m lightning_draft fit --config quickstart
    python -m examples.before_after --lora runs/quickstart/lora/best.safetensors --out examples/results/quickstart.png

The twelve pairs are not picked: the captions are put in an order by seed 0, the noise is that of seed 0, and the first
twelve are shown. The figures are means over all captions with `--noises` noises each, with standard errors; for the
distance to the clean picture, the emoji pictures are needed (`python -m examples.emoji_model.data`).
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.emoji_model.evaluate import draw, mean_and_error, open_pipeline
from examples.emoji_model.truth import OwnPicture, SceneRecognized
from lightning_draft.assets import FOLDER
from lightning_draft.data import read_prompts
from lightning_draft.rewards import Reward
from lightning_draft.rewards.quality import CleanFraction, ImageQuality

SHOWN = 12
COLUMNS = 4


def ordered(prompts: str) -> list[str]:
    """Return the captions of a list in the order of seed 0."""
    captions = [str(prompt) for prompt in read_prompts(prompts)]
    return [captions[i] for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()]


def rewards(data: Path) -> dict[str, Reward]:
    """Return what both sets are measured with."""
    found: dict[str, Reward] = {
        "reward: log p(clean)": ImageQuality("emoji64-judge"),
        "evaluation judge: log p(clean)": ImageQuality("emoji64-judge-eval"),
        "evaluation judge: clean fraction": CleanFraction("emoji64-judge-eval"),
    }
    pictures = data / "emoji64.npz"
    if pictures.exists():
        found["truth: PSNR to the clean picture (dB)"] = OwnPicture(str(pictures))
        found["truth: nearest picture is the caption's"] = SceneRecognized(str(pictures))
    return found


def compare(before: Tensor, after: Tensor, captions: list[str], data: Path) -> dict[str, dict[str, list[float]]]:
    """Return for each reward (mean, standard error) before, after, and of the difference pair by pair."""
    figures = {}
    for name, reward in rewards(data).items():
        scores = [reward(pictures, captions) for pictures in (before, after)]
        columns = {"before": scores[0], "after": scores[1], "difference": scores[1] - scores[0]}
        figures[name] = {label: [round(x, 3) for x in mean_and_error(s)] for label, s in columns.items()}
    return figures


def pairs(before: Tensor, after: Tensor, captions: list[str], path: Path, zoom: int = 2) -> None:
    """Write the pairs `(N, 3, H, W)` side by side under their captions, `COLUMNS` a row."""
    side = before.shape[-1] * zoom
    width, height = 2 * side + 20, side + 26
    rows = -(-len(captions) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * width + 8, rows * height + 6), (232, 232, 232))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, caption in enumerate(captions):
        left, top = 8 + i % COLUMNS * width, 4 + i // COLUMNS * height
        pen.text((left, top), f"{caption}   before | after", fill=(30, 30, 30), font=font)
        for k, pictures in enumerate((before, after)):
            canvas.paste(_image(pictures[i], side), (left + k * (side + 4), top + 18))
    canvas.save(path)


def _image(picture: Tensor, side: int) -> Image.Image:
    pixels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def main() -> None:
    """Write the picture and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="PNG; the figures are written beside it as JSON")
    parser.add_argument("--model", default=str(FOLDER / "emoji64"))
    parser.add_argument("--prompts", default="emoji64_eval")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji"))
    arguments = parser.parse_args()
    captions = ordered(arguments.prompts)
    everything = captions * arguments.noises
    drawings = [
        draw(open_pipeline(Path(arguments.model), lora), everything, guidance=1.0, steps=arguments.steps)
        for lora in (None, arguments.lora)
    ]
    pairs(drawings[0][:SHOWN], drawings[1][:SHOWN], captions[:SHOWN], arguments.out)
    figures = compare(drawings[0], drawings[1], everything, arguments.data)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
