"""Compare ImageReward on the four images of its authors' README with the published scores.

    git clone --depth 1 https://github.com/THUDM/ImageReward
    python -m examples.image_reward_published ImageReward/assets/images
    python -m examples.image_reward_published ImageReward/assets/images weights=FILE config=FILE tokenizer=FOLDER

Arguments after the folder are those of the reward. The authors note that the digits depend slightly on the device;
images are resized as tensors here and with Pillow there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_draft.rewards import ImageReward, Reward

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
PUBLISHED = {
    "1.webp": 0.5811622738838196,
    "2.webp": 0.2745276093482971,
    "3.webp": -1.4131819009780884,
    "4.webp": -2.029569625854492,
}
TOLERANCE = 0.05


@torch.no_grad()
def scores(reward: Reward, folder: Path) -> dict[str, float]:
    """Return the score of each image by file name."""
    found = {}
    for name in PUBLISHED:
        single = np.array(Image.open(folder / name).convert("RGB"))
        image = torch.from_numpy(single).permute(2, 0, 1).unsqueeze(0) / 255
        found[name] = reward(image, [PROMPT]).item()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores side by side; 1 if one differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that of 1.webp to 4.webp")
    parser.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="arguments of the reward")
    options = parser.parse_args(argv)
    pairs = [argument.partition("=") for argument in options.arguments]
    if not all(equals for _, equals, _ in pairs):
        parser.error("arguments of the reward are written NAME=VALUE")
    found = scores(ImageReward(**{name: value for name, _, value in pairs}).eval(), options.folder)
    for name, score in found.items():
        print(f"{name} ours {score:8.4f}   published {PUBLISHED[name]:8.4f}")
    largest = max(abs(score - PUBLISHED[name]) for name, score in found.items())
    print(f"largest difference {largest:.2g}, allowed {TOLERANCE:g}")
    return int(not largest <= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
