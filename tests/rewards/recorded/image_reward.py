"""Record what the reference implementation of ImageReward computes with small reproducible weights.

    git clone https://github.com/THUDM/ImageReward
    pip install "torch>=2" "transformers>=4.57,<5" numpy pillow
    python tests/rewards/recorded/image_reward.py ImageReward tests/rewards/recorded/image_reward.json

The weights, the vocabulary and the images depend only on their names and numbers. The vision transformer, the text
encoder and the scoring of the reference run unchanged. Their imports from timm, fairscale and torchvision are replaced
by short equivalents, because these packages cannot be installed together.
"""

import json
import string
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZE, PATCH, WIDTH, BLOCKS = 32, 8, 128, 2
HEAD = (64, 1024, 128, 64, 16, 1)
WORDS = ["red", "cat", "a", "photo", "of", "the", ".", ","]
CONFIG = {
    "vocab_size": 5 + 2 * 26 + len(WORDS) - 1 + 2,
    "hidden_size": HEAD[0],
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROMPTS = ["a photo of the red cat", "cat", "Dogs, and a bird. " * 8]
SIZES = [(32, 32), (48, 33), (40, 91), (20, 27)]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict, in small."""
    vision, text, width = "blip.visual_encoder.", "blip.text_encoder.", CONFIG["hidden_size"]
    found: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, WIDTH),
        f"{vision}pos_embed": (1, (SIZE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": (WIDTH,),
    }

    def linear(name: str, to: int, of: int) -> None:
        found.update({f"{name}.weight": (to, of), f"{name}.bias": (to,)})

    def norm(name: str, of: int) -> None:
        found.update({f"{name}.weight": (of,), f"{name}.bias": (of,)})

    for block in (f"{vision}blocks.{index}." for index in range(BLOCKS)):
        norm(f"{block}norm1", WIDTH)
        linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}attn.proj", WIDTH, WIDTH)
        norm(f"{block}norm2", WIDTH)
        linear(f"{block}mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{block}mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{vision}norm", WIDTH)
    found[f"{text}embeddings.word_embeddings.weight"] = (CONFIG["vocab_size"], width)
    found[f"{text}embeddings.position_embeddings.weight"] = (CONFIG["max_position_embeddings"], width)
    norm(f"{text}embeddings.LayerNorm", width)
    for layer in (f"{text}encoder.layer.{index}." for index in range(CONFIG["num_hidden_layers"])):
        for attention, of in (("attention", width), ("crossattention", WIDTH)):
            linear(f"{layer}{attention}.self.query", width, width)
            linear(f"{layer}{attention}.self.key", width, of)
            linear(f"{layer}{attention}.self.value", width, of)
            linear(f"{layer}{attention}.output.dense", width, width)
            norm(f"{layer}{attention}.output.LayerNorm", width)
        linear(f"{layer}intermediate.dense", CONFIG["intermediate_size"], width)
        linear(f"{layer}output.dense", width, CONFIG["intermediate_size"])
        norm(f"{layer}output.LayerNorm", width)
    linear("blip.vision_proj", 8, WIDTH)
    linear("blip.text_proj", 8, width)
    for number, of, to in zip((0, 2, 4, 6, 7), HEAD, HEAD[1:], strict=False):
        linear(f"mlp.layers.{number}", to, of)
    return found


def state_dict() -> dict[str, torch.Tensor]:
    """Float32 weights from a generator seeded by each name, and the buffer that the published file also has."""
    weights = {}
    for name, shape in shapes().items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        scale = 1.5 / shape[-1] ** 0.5 if len(shape) == 2 and "embed" not in name else 0.3
        center = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")) else 0.0
        weights[name] = torch.from_numpy(center + scale * values).float()
    length = CONFIG["max_position_embeddings"]
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(length).unsqueeze(0)
    return weights


def write(folder: Path) -> Path:
    """Write the three files that the reward reads, in the published format, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict(), folder / "small.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    letters = string.ascii_lowercase
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *WORDS])
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def make_image(height: int, width: int, seed: int) -> Image.Image:
    """A smooth colored image."""
    phases, waves = (np.random.RandomState(seed + shift).uniform(0, 6, (3, 2)) for shift in (0, 1000))
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [np.sin(p[0] + 3 * w[0] * y) * np.cos(p[1] + 3 * w[1] * x) for p, w in zip(phases, waves, strict=True)]
    return Image.fromarray(np.uint8(np.round(127.5 + 120 * np.stack(planes, -1))))


def stand_ins() -> None:
    """Provide replacements for packages that the reference imports and does not use here."""

    class PatchEmbed(nn.Module):
        def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
            super().__init__()
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        sys.modules[name] = made
        return made

    import transformers.modeling_utils as modeling
    import transformers.pytorch_utils as helpers

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(modeling, name, getattr(helpers, name))
    sys.modules["transformers.file_utils"] = sys.modules["transformers.utils"]
    for name in ("timm", "timm.models", "fairscale", "fairscale.nn", "fairscale.nn.checkpoint", "torchvision"):
        module(name, __path__=[])
    module("timm.models.vision_transformer", _cfg=nothing, PatchEmbed=PatchEmbed)
    module("timm.models.registry", register_model=nothing)
    module("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, DropPath=nn.Dropout)
    module("timm.models.helpers", named_apply=nothing, adapt_input_conv=nothing)
    module("timm.models.hub", download_cached_file=nothing)
    module("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=nothing)
    steps = dict.fromkeys(("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize", "InterpolationMode"), nothing)
    module("torchvision.transforms", **{**steps, "InterpolationMode": Image.Resampling})


def reference(checkout: Path) -> Any:
    """The reference model with our weights, in float64, as the object on which its `score_gard` is called."""
    stand_ins()
    for package in ("ImageReward", "ImageReward.models", "ImageReward.models.BLIP"):
        made = types.ModuleType(package)
        made.__path__ = [str(checkout.joinpath(*package.split(".")))]
        sys.modules[package] = made
    from ImageReward.ImageReward import MLP, ImageReward
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    blip = nn.Module()
    blip.visual_encoder = VisionTransformer(SIZE, PATCH, embed_dim=WIDTH, depth=BLOCKS, num_heads=WIDTH // 64)
    config = BertConfig(**{**CONFIG, "encoder_width": WIDTH})
    blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
    blip.vision_proj, blip.text_proj = nn.Linear(WIDTH, 8), nn.Linear(HEAD[0], 8)
    model = nn.Module()
    model.blip = blip
    model.mlp = MLP(HEAD[0])
    model.load_state_dict(state_dict(), strict=False)
    model.double().eval()
    missing = model.state_dict().keys() - state_dict().keys()
    assert not missing, missing
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    model.score_gard = types.MethodType(ImageReward.score_gard, model)
    return model


def tokenized(folder: Path) -> Any:
    """Tokenize as the reference does."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")


def pixels(image: Image.Image) -> torch.Tensor:
    """Resize the short side, crop the center, normalize, all by Pillow and numpy."""
    short = min(image.size)
    width, height = (SIZE if side == short else int(SIZE * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC) if image.size != (width, height) else image
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    values = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float64) / 255
    values = (values - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy(values).permute(2, 0, 1)


def main(checkout: str, output: str) -> None:
    """Score every image with every prompt."""
    import tempfile

    model = reference(Path(checkout).resolve())
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenized(write(Path(folder)))
    scores = {}
    for height, width in SIZES:
        images = torch.stack([pixels(make_image(height, width, seed)) for seed in range(len(PROMPTS))])
        with torch.no_grad():
            found = model.score_gard(tokens["input_ids"], tokens["attention_mask"], images).squeeze(1)
        scores[f"{height}x{width}"] = found.tolist()
    Path(output).write_text(json.dumps({"prompts": PROMPTS, "scores": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
