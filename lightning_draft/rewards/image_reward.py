"""ImageReward: a human preference score from BLIP and a linear head.

The published weights are loaded into transformers' BLIP classes; the `image-reward` package is not needed.

References:
    Xu et al., arXiv:2304.05977 (ImageReward); Li et al., arXiv:2201.12086 (BLIP).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.precision import Precision, check_precision, full_precision
from lightning_draft.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from lightning_draft.rewards.weights import PublishedFile, find_file, load_state, read_tensors

WEIGHTS = PublishedFile(
    "THUDM/ImageReward",
    "ImageReward.pt",
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)
CONFIG = PublishedFile("THUDM/ImageReward", "med_config.json")
VOCABULARY = PublishedFile("google-bert/bert-base-uncased", "vocab.txt")

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "norm.": "post_layernorm.",
}
_HEAD_DIM = 64
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)


class ImageReward(Reward):
    """`(head(BLIP(image, prompt)) - 0.1672) / 1.0333`: mean 0 and standard deviation 1 on its training data.

    Good images score 0.5 to 2, bad ones -1 to -2.3. The prompt is truncated to 35 tokens.

    Args:
        weights: `ImageReward.pt`, or the folder that contains it; by default from the hub (THUDM/ImageReward, 1.79 GB).
        config: `med_config.json`, or the folder that contains it; by default beside the weights, else from the hub.
        tokenizer: `vocab.txt` of BERT's uncased tokenizer, or the folder that contains it; by default from the hub.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: A file is missing, damaged, or of another model.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: str | None = None,
        tokenizer: str | None = None,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        check_precision(dtype)
        path = find_file(WEIGHTS, weights)
        if config is None and (path.parent / CONFIG.name).is_file():
            config = str(path.parent)
        text = _read_json(find_file(CONFIG, config, "config"))
        self.tokenizer = _read_tokenizer(find_file(VOCABULARY, tokenizer, "tokenizer"), text["vocab_size"])
        self.model = PreferenceModel(read_tensors(path), text, path)
        self.model.to(getattr(torch, dtype)).eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        tokens = self.tokenizer(
            [str(prompt) for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(images.device)
        with full_precision(images) as x:
            pixels = preprocess(x, self.model.image_size).to(self.model.dtype)
            output = self.model(pixels, tokens["input_ids"], tokens["attention_mask"])
            score: Tensor = (output.to(x.dtype) - MEAN) / STD
            return score


class PreferenceModel(nn.Module):
    """BLIP's vision transformer, its text encoder with cross-attention, and a head without non-linearities.

    Args:
        tensors: The published state dict; its shapes give all sizes except those of the text encoder.
        config: The text encoder's configuration.
        source: Where the tensors come from, for messages.

    Raises:
        ConfigurationError: The tensors belong to another model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        try:
            width, _, patch, _ = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape
            places = tensors["blip.visual_encoder.pos_embed"].shape[1] - 1
            blocks = sum(name.endswith(".attn.qkv.weight") for name in tensors)
            head = [tensors[name].shape for name in tensors if name.startswith("mlp.") and name.endswith(".weight")]
            self.image_size = patch * round(places**0.5)
            vision = BlipVisionConfig(
                hidden_size=width,
                intermediate_size=tensors["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=blocks,
                num_attention_heads=width // _HEAD_DIM,
                image_size=self.image_size,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        except KeyError as error:
            raise ConfigurationError(
                f"{source} is not a checkpoint of ImageReward: it lacks {error}; give {WEIGHTS}"
            ) from error
        text = BlipTextConfig(**{name: config[name] for name in _TEXT}, encoder_hidden_size=width, is_decoder=True)
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(*(nn.Linear(shape[1], shape[0]) for shape in head))
        load_state(self, convert_state_dict(tensors), source)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute scores `(B,)` before normalization from pixels `(B, 3, S, S)` and tokens `(B, L)` with their mask."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image)
        scores: Tensor = self.head(text.last_hidden_state[:, 0]).squeeze(-1)
        return scores


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize the shortest side, crop the center and normalize: `(B, 3, H, W)` in [0, 1] to `(B, 3, size, size)`.

    The crop's corner is rounded as torchvision rounds it, half to even.
    """
    height, width = images.shape[-2:]
    larger = int(size * max(height, width) / min(height, width))
    resized = (size, larger) if height <= width else (larger, size)
    if resized != (height, width):
        images = F.interpolate(images, resized, mode="bicubic", align_corners=False, antialias=True)
    top, left = (round((length - size) / 2) for length in resized)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images[..., top : top + size, left : left + size] - mean) / std


def convert_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published state dict for `PreferenceModel`; BLIP's unused projections are omitted."""
    result: dict[str, Tensor] = {}
    layers: dict[str, int] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.removeprefix("blip.").partition(".")
        if part == "visual_encoder":
            for theirs, ours in _VISION.items():
                rest = ours + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
                rest = rest.replace(theirs, ours) if theirs.startswith(".") else rest
            result[f"vision.{rest}"] = tensor
        elif part == "text_encoder" and rest != "embeddings.position_ids":
            result[f"text.{rest}"] = tensor
        elif part == "mlp":
            _, layer, kind = rest.split(".")
            result[f"head.{layers.setdefault(layer, len(layers))}.{kind}"] = tensor
    return result


def _read_tokenizer(vocabulary: Path, words: int) -> Any:
    """Read BERT's tokenizer and add BLIP's two tokens, for which the embedding has rows."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(vocabulary.parent)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != words:
        raise ConfigurationError(
            f"{vocabulary} makes a tokenizer of {len(tokenizer)} words with BLIP's two, and the model has {words}; "
            f"give {VOCABULARY}, or leave tokenizer out"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _TEXT if name not in config]
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is not a JSON object: {error}; give {CONFIG}") from error
    if missing:
        raise ConfigurationError(f"{path} lacks {', '.join(missing)}; give {CONFIG}")
    return dict(config)
