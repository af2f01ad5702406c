"""Record what the hpsv2 package computes with small reproducible weights.

    pip install --no-deps hpsv2==1.2.0
    pip install ftfy regex clint requests torchvision
    python tests/rewards/recorded/hpsv2.py tests/rewards/recorded/hpsv2.json

The weights, the vocabulary and the images depend only on their names and numbers.
"""

import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE, PATCH, WIDTH, LAYERS, HEADS, CONTEXT, EMBEDDING = 32, 8, 32, 2, 16, 77, 24
MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "n"), ("t", "h"), ("th", "e</w>")]
ENDS = ["<|startoftext|>", "<|endoftext|>"]
PROMPTS = [
    "a photo of the red cat",
    "Red  CATS &amp; \u201cdogs\u201d, it\u2019s 7 o'clock",
    "the red cat and " * 30,
    "\ufb01ne caf\u00e9 \uff21\uff22 \u4e2d\u6587 \u2014 10\u00bd!",
]
SIZES = [(32, 32), (48, 48), (48, 33), (40, 91), (20, 27), (12, 12)]


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in CLIP's vocabulary, in its order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def vocabulary() -> list[str]:
    letters = byte_letters()
    return [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES), *ENDS]


def write_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict, in small."""
    words, patches = len(vocabulary()), (IMAGE // PATCH) ** 2
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CONTEXT, WIDTH),
        "text_projection": (WIDTH, EMBEDDING),
        "logit_scale": (),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (patches + 1, WIDTH),
        "visual.proj": (WIDTH, EMBEDDING),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": (words, WIDTH),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.transformer", "transformer"):
        for block in (f"{tower}.resblocks.{index}" for index in range(LAYERS)):
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            for name, to, of in (
                ("attn.in_proj_", 3 * WIDTH, WIDTH),
                ("attn.out_proj.", WIDTH, WIDTH),
                ("mlp.c_fc.", 4 * WIDTH, WIDTH),
                ("mlp.c_proj.", WIDTH, 4 * WIDTH),
            ):
                found |= {f"{block}.{name}weight": (to, of), f"{block}.{name}bias": (to,)}
    return found | {f"{norm}.{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}


def weights() -> dict[str, Tensor]:
    """A state dict in open_clip's layout, float32: sines of large steps, whose phase is the name's checksum."""
    tensors = {}
    for name, shape in shapes().items():
        count = math.prod(shape)
        values = torch.sin(12.9898 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.1 + zlib.crc32(name.encode()))
        scale = 1.4 / shape[-1] ** 0.5 if len(shape) > 1 and "embedding" not in name else 0.3
        tensors[name] = (scale * values.reshape(shape)).float()
        if ".ln_" in f".{name}" and name.endswith("weight"):
            tensors[name] += 1
    tensors["logit_scale"] = torch.tensor(math.log(100.0))
    return tensors


def write(folder: Path) -> Path:
    """The checkpoint, `tiny.pt`, and the tokenizer's files."""
    write_tokenizer(folder)
    torch.save({"state_dict": weights()}, folder / "tiny.pt")
    return folder


def make_images(height: int, width: int) -> Tensor:
    """One smooth image per prompt, float32 `(B, 3, height, width)`, whole bytes."""
    y = torch.linspace(0, 1, height, dtype=torch.float64).view(-1, 1)
    x = torch.linspace(0, 1, width, dtype=torch.float64)
    images = [
        torch.stack(
            [torch.sin(3 * (c + 1) * x + 2 * (n + 1) * y + n + c) + torch.cos(9 * x * y + 5 * n) for c in range(3)]
        )
        for n in range(len(PROMPTS))
    ]
    return (torch.stack(images) / 4 + 0.5).mul(255).round().div(255).float()


def architecture() -> dict[str, Any]:
    """The sizes as open_clip writes them."""
    tower = {"width": WIDTH, "layers": LAYERS}
    return {
        "embed_dim": EMBEDDING,
        "vision_cfg": {**tower, "image_size": IMAGE, "patch_size": PATCH, "head_width": WIDTH // HEADS},
        "text_cfg": {**tower, "context_length": CONTEXT, "vocab_size": len(vocabulary()), "heads": HEADS},
    }


def main(file: str) -> None:
    from transformers import AutoTokenizer

    from lightning_draft.rewards.hpsv2_reference import HPSv2Reference, bpe_merges, import_hpsv2

    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name))
        (folder / "tiny.json").write_text(json.dumps(architecture()))
        package = import_hpsv2(bpe_merges(AutoTokenizer.from_pretrained(folder)))
        package.add_model_config(folder / "tiny.json")
        reward = HPSv2Reference("v2.1", str(folder / "tiny.pt"), name, architecture="tiny")
        scores = {f"{height}x{width}": reward(make_images(height, width), PROMPTS).tolist() for height, width in SIZES}
        tokens = [package.tokenize([prompt])[0].tolist() for prompt in PROMPTS]
    record = {"by": "hpsv2 1.2.0", "scores": scores, "tokens": [" ".join(map(str, row)) for row in tokens]}
    Path(file).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
