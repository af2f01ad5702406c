"""Random weights in the published formats and sizes of the rewards' networks."""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

CLIP_WORDS, BERT_WORDS = 49408, 30522
Shapes = dict[str, tuple[int, ...]]


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return random bfloat16 tensors, made of one million repeated numbers; scales of norms are 1."""
    numbers = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.long)
        elif len(shape) == 1 and name.endswith(("weight", "var")):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = numbers.repeat(-(-size // len(numbers)))[:size].view(shape).clone()
    return tensors


def write_model(folder: Path, kind: str, config: Any, *parts: Any) -> str:
    """Write a transformers model, its processor and tokenizer, and return the folder."""
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    config.architectures = [kind]
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(random_tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def write_clip_words(folder: Path, length: int = 77) -> Any:
    """Write a tokenizer of letters in CLIP's format, with the full number of tokens."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"unused{number}" for number in range(CLIP_WORDS - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def write_bert_words(folder: Path) -> str:
    """Write a vocabulary of letters with the length of BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    words += [f"[unused{number}]" for number in range(BERT_WORDS - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def write_clip(folder: Path, vision: dict[str, Any], text: dict[str, Any], embedding: int) -> str:
    """Write a CLIP with its tokenizer and image processor."""
    config = transformers.CLIPConfig(
        text_config={"vocab_size": CLIP_WORDS, "eos_token_id": CLIP_WORDS - 1, "projection_dim": embedding, **text},
        vision_config={"image_size": 224, "projection_dim": embedding, **vision},
        projection_dim=embedding,
    )
    words = write_clip_words(folder)
    return write_model(folder, "CLIPModel", config, transformers.CLIPImageProcessor(), words)


def tower(width: int, depth: int, heads: int) -> dict[str, int]:
    """Return the config of a transformer whose hidden layers are four times as wide."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


B32 = {"vision": {**tower(768, 12, 12), "patch_size": 32}, "text": tower(512, 12, 8), "embedding": 512}
L14 = {"vision": {**tower(1024, 24, 16), "patch_size": 14}, "text": tower(768, 12, 12), "embedding": 768}
H14 = {"vision": {**tower(1280, 32, 16), "patch_size": 14}, "text": tower(1024, 24, 16), "embedding": 1024}


def open_clip_shapes(
    vision: tuple[int, int] = (1280, 32),
    text: tuple[int, int] = (1024, 24),
    embedding: int = 1024,
    words: int = CLIP_WORDS,
    places: tuple[int, int] = (257, 77),
    patch: int = 14,
) -> Shapes:
    """Return names and shapes of an open_clip checkpoint, by default of ViT-H-14."""
    width, length = vision[0], text[0]
    found: Shapes = {
        "logit_scale": (),
        "positional_embedding": (places[1], length),
        "text_projection": (length, embedding),
        "token_embedding.weight": (words, length),
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": (places[0], width),
        "visual.proj": (width, embedding),
    }
    norms = [("ln_final", length), ("visual.ln_pre", width), ("visual.ln_post", width)]
    for blocks, (size, depth) in (("visual.transformer.resblocks", vision), ("transformer.resblocks", text)):
        for block in (f"{blocks}.{number}." for number in range(depth)):
            norms += [(f"{block}ln_1", size), (f"{block}ln_2", size)]
            found |= {f"{block}attn.in_proj_weight": (3 * size, size), f"{block}attn.in_proj_bias": (3 * size,)}
            found |= linear(f"{block}attn.out_proj", size, size)
            found |= linear(f"{block}mlp.c_fc", 4 * size, size) | linear(f"{block}mlp.c_proj", size, 4 * size)
    return found | {f"{name}.{kind}": (size,) for name, size in norms for kind in ("weight", "bias")}


def image_reward_shapes(
    vision: tuple[int, int] = (1024, 24), text: tuple[int, int] = (768, 12), words: int = BERT_WORDS + 2, grid: int = 14
) -> Shapes:
    """Return names and shapes of ImageReward.pt, by default of the published file, without unused parts."""
    (width, blocks), (length, layers) = vision, text
    eye, mind = "blip.visual_encoder.", "blip.text_encoder."
    found: Shapes = {
        f"{eye}cls_token": (1, 1, width),
        f"{eye}pos_embed": (1, grid**2 + 1, width),
        f"{eye}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{eye}patch_embed.proj.bias": (width,),
        f"{mind}embeddings.word_embeddings.weight": (words, length),
        f"{mind}embeddings.position_embeddings.weight": (512, length),
    }
    norms = [(f"{eye}norm", width), (f"{mind}embeddings.LayerNorm", length)]
    for block in (f"{eye}blocks.{number}." for number in range(blocks)):
        norms += [(f"{block}norm1", width), (f"{block}norm2", width)]
        found |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        found |= linear(f"{block}mlp.fc1", 4 * width, width) | linear(f"{block}mlp.fc2", width, 4 * width)
    for layer in (f"{mind}encoder.layer.{number}." for number in range(layers)):
        for attention, of in ((f"{layer}attention.", length), (f"{layer}crossattention.", width)):
            found |= linear(f"{attention}self.query", length, length) | linear(f"{attention}self.key", length, of)
            found |= linear(f"{attention}self.value", length, of) | linear(f"{attention}output.dense", length, length)
            norms.append((f"{attention}output.LayerNorm", length))
        found |= linear(f"{layer}intermediate.dense", 4 * length, length)
        found |= linear(f"{layer}output.dense", length, 4 * length)
        norms.append((f"{layer}output.LayerNorm", length))
    widths = (length, 1024, 128, 64, 16, 1)
    for number, of, to in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        found |= linear(f"mlp.layers.{number}", to, of)
    return found | {f"{name}.{kind}": (size,) for name, size in norms for kind in ("weight", "bias")}


def linear(name: str, to: int, of: int) -> Shapes:
    """Return names and shapes of a linear layer."""
    return {f"{name}.weight": (to, of), f"{name}.bias": (to,)}
