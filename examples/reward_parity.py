"""Compare rewards with published weights with the reference pipelines of their authors, on synthetic images.

    python -m examples.reward_parity hpsv2.1
    python -m examples.reward_parity hpsv2.1 weights=HPS_v2.1_compressed.pt tokenizer=FOLDER
    python -m examples.reward_parity hpsv2.1 weights=HPS_v2.1_compressed.pt tokenizer=FOLDER --record

Arguments after the name are those of the reward. The first two forms score the images with this package and compare
with `reward_scores.json`; `--record` runs the reference on PIL images and writes its scores there. For
HPSv2 that is the `hpsv2` package (see `lightning_draft/rewards/hpsv2_reference.py` for how to install it), for the
others transformers' own processor and model, and the layers that the authors published.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_draft.rewards import AestheticScore, CLIPScore, HPSv2, PickScore, Reward

FILE = Path(__file__).with_name("reward_scores.json")
PROMPTS = [
    "a red fox in the snow",
    "an oil painting of a harbour at dusk",
    "waves",
    "a photo of an astronaut, \u201c4k\u201d",
]
SIZES = [(512, 512), (384, 640), (500, 301), (224, 224)]


def make_images() -> list[Image.Image]:
    """Return one smooth synthetic image per prompt, in several shapes."""
    images = []
    for n, (height, width) in enumerate(SIZES):
        y = torch.linspace(0, 1, height, dtype=torch.float64).view(-1, 1)
        x = torch.linspace(0, 1, width, dtype=torch.float64)
        waves = [
            torch.sin((5 + 3 * c + n) * x + (4 + 2 * n) * y + c) + torch.cos(40 * x * y * (1 + n)) for c in range(3)
        ]
        images.append(Image.fromarray(((torch.stack(waves, -1) / 4 + 0.5) * 255).round().byte().numpy()))
    return images


def tensors(images: Sequence[Image.Image]) -> list[Tensor]:
    """Convert PIL images to tensors `(1, 3, H, W)` in [0, 1]."""
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0) / 255 for image in images]


def by_hpsv2(images: Sequence[Image.Image], prompts: Sequence[str], **arguments: Any) -> list[float]:
    """Return the scores of the hpsv2 package."""
    from lightning_draft.rewards.hpsv2_reference import HPSv2Reference

    reward = HPSv2Reference(**arguments)
    return [reward(x, [prompt]).item() for x, prompt in zip(tensors(images), prompts, strict=True)]


@torch.no_grad()
def by_clip(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    pretrained: str,
    processor: str | None = None,
    scaled: bool = False,
) -> list[float]:
    """Return cosines of transformers' CLIP on PIL images, times its logit scale if `scaled`."""
    from transformers import CLIPModel, CLIPProcessor

    model, process = (
        CLIPModel.from_pretrained(pretrained).eval(),
        CLIPProcessor.from_pretrained(processor or pretrained),
    )
    options = {"return_tensors": "pt", "padding": True, "truncation": True}
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        logit = model(**process(text=[prompt], images=[image], **options)).logits_per_image.item()
        scores.append(logit if scaled else logit / model.logit_scale.exp().item())
    return scores


@torch.no_grad()
def by_laion(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    head: str,
    version: str = "v2",
    pretrained: str = "openai/clip-vit-large-patch14",
) -> list[float]:
    """Return scores of LAION's predictors, layer by layer, on unit embeddings of transformers' CLIP."""
    from transformers import CLIPModel, CLIPProcessor

    weights = torch.load(head, map_location="cpu", weights_only=True)
    layers: list[nn.Module] = []
    for name in [name for name in weights if name.endswith("weight")]:
        layers.append(nn.Linear(*reversed(weights[name].shape)))
        layers[-1].load_state_dict({"weight": weights[name], "bias": weights[name.replace("weight", "bias")]})
    model, process = CLIPModel.from_pretrained(pretrained).eval(), CLIPProcessor.from_pretrained(pretrained)
    output = model(**process(text=[""], images=list(images), return_tensors="pt", padding=True))
    return nn.Sequential(*layers)(output.image_embeds).squeeze(1).tolist()


@dataclass(frozen=True)
class Case:
    """A reward, its reference, and the default arguments of both.

    Args:
        reward: The reward of this package.
        reference: The reference implementation.
        tolerance: Largest difference allowed.
        defaults: Arguments of both.
        reference_only: Arguments of the reference alone.
    """

    reward: Callable[..., Reward]
    reference: Callable[..., list[float]]
    tolerance: float
    defaults: dict[str, Any]
    reference_only: dict[str, Any]


LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CASES = {
    "hpsv2.0": Case(HPSv2, by_hpsv2, 1e-4, {"version": "v2.0"}, {}),
    "hpsv2.1": Case(HPSv2, by_hpsv2, 1e-4, {"version": "v2.1"}, {}),
    "pickscore": Case(
        PickScore,
        by_clip,
        0.1,
        {"pretrained": "yuvalkirstain/PickScore_v1", "processor": LAION_CLIP},
        {"scaled": True},
    ),
    "aesthetic-v1": Case(AestheticScore, by_laion, 0.1, {"version": "v1"}, {}),
    "aesthetic-v2": Case(AestheticScore, by_laion, 0.1, {"version": "v2"}, {}),
    "clipscore": Case(CLIPScore, by_clip, 0.003, {"pretrained": "openai/clip-vit-large-patch14"}, {}),
}


def record(name: str, arguments: dict[str, str], file: Path) -> list[float]:
    """Write the reference's scores into the file, and return them."""
    import transformers

    case = CASES[name]
    scores = case.reference(make_images(), PROMPTS, **{**case.defaults, **arguments, **case.reference_only})
    figures = json.loads(file.read_text())
    software = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    given = {key: Path(value).name if Path(value).exists() else value for key, value in arguments.items()}
    figures[name] = {"scores": scores, "software": software, "arguments": {**case.defaults, **given}}
    file.write_text(json.dumps(figures, indent=2) + "\n")
    return scores


def compare(name: str, arguments: dict[str, str], file: Path) -> float:
    """Print our scores and the recorded ones side by side, and return the largest difference.

    Raises:
        SystemExit: There are no recorded scores.
    """
    figures = json.loads(file.read_text())
    if name not in figures:
        raise SystemExit(f"{file} has no figures for {name} yet: {figures['note']}")
    case = CASES[name]
    reward = case.reward(**{**case.defaults, **arguments})
    largest = 0.0
    for x, prompt, theirs in zip(tensors(make_images()), PROMPTS, figures[name]["scores"], strict=True):
        with torch.no_grad():
            ours = reward(x, [prompt]).item()
        print(f"{x.shape[-2]}x{x.shape[-1]:<5} ours {ours:10.5f}   reference {theirs:10.5f}   {prompt}")
        largest = max(largest, abs(ours - theirs) if math.isfinite(ours) else math.inf)
    print(f"largest difference {largest:.2g}, allowed {case.tolerance:g}")
    return largest


def main(argv: Sequence[str] | None = None) -> int:
    """Compare or record scores; return 1 if our scores differ from those of the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", choices=sorted(CASES))
    parser.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="arguments of the reward")
    parser.add_argument("--record", action="store_true", help="run the reference and write its figures")
    parser.add_argument("--file", type=Path, default=FILE, help="where the figures are")
    options = parser.parse_args(argv)
    pairs = [argument.partition("=") for argument in options.arguments]
    if not all(equals for _, equals, _ in pairs):
        parser.error("arguments of the reward are written NAME=VALUE")
    arguments = {name: value for name, _, value in pairs}
    if options.record:
        print(*record(options.reward, arguments, options.file))
        return 0
    return int(compare(options.reward, arguments, options.file) > CASES[options.reward].tolerance)


if __name__ == "__main__":
    raise SystemExit(main())
