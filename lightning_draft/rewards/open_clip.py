"""Checkpoints of open_clip's vision transformers as `transformers.CLIPModel`, and open_clip's cleaning of texts."""

import html
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.pretrained import quiet
from lightning_draft.rewards.weights import check_state_dict

_TEXT, _VISION = "text_model", "vision_model"
_NAMES = (
    (r"^visual\.class_embedding$", f"{_VISION}.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", f"{_VISION}.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", f"{_VISION}.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", f"{_VISION}.pre_layrnorm."),
    (r"^visual\.ln_post\.", f"{_VISION}.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", f"{_VISION}.encoder.layers."),
    (r"^token_embedding\.", f"{_TEXT}.embeddings.token_embedding."),
    (r"^positional_embedding$", f"{_TEXT}.embeddings.position_embedding.weight"),
    (r"^ln_final\.", f"{_TEXT}.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", f"{_TEXT}.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_PLAIN = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n"}
    | {"\ufeff": ""}
    | dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


def clip_from_open_clip(tensors: Mapping[str, Tensor], heads: int, source: Path | str) -> Any:
    """Convert an open_clip model with exact GELU to a `CLIPModel`.

    All sizes are read from the shapes of the tensors, except for the number of heads.

    Args:
        tensors: State dict of an open_clip `CLIP` with a vision transformer.
        heads: Attention heads of both towers.
        source: Where the tensors come from, for messages.

    Raises:
        ConfigurationError: The tensors belong to another architecture.
    """
    from transformers import CLIPModel

    try:
        config = _config(tensors, heads)
    except KeyError as error:
        raise ConfigurationError(
            f"{source} does not fit: it has no {error.args[0]}, which every open_clip checkpoint of a vision "
            "transformer has; give the file that the reward names"
        ) from error
    renamed = _renamed(tensors)
    with torch.device("meta"):
        check_state_dict(CLIPModel(config).state_dict(), renamed, source)
    with quiet():
        return CLIPModel.from_pretrained(None, config=config, state_dict=renamed)


def clean_text(text: str) -> str:
    """Normalize a text as open_clip's tokenizer does before the transformers tokenizer of the same vocabulary.

    HTML entities, curly quotes, ligatures and full-width letters are replaced by plain ones, and control characters are
    removed. Unlike in open_clip, text that was decoded with the wrong codec ("Ã©") is left unchanged.
    """
    text = html.unescape(html.unescape(text)).translate(_PLAIN)
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uffef" or c == "\u3000" else c for c in text)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _config(tensors: Mapping[str, Tensor], heads: int) -> Any:
    from transformers import CLIPConfig

    vocabulary, text_width = tensors["token_embedding.weight"].shape
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    patches = len(tensors["visual.positional_embedding"]) - 1
    shared = {"num_attention_heads": heads, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    text = {
        **_tower(tensors, "transformer.resblocks", text_width),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        **_tower(tensors, "visual.transformer.resblocks", width),
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
    }
    embedding = tensors["visual.proj"].shape[1]
    return CLIPConfig(
        text_config={**shared, **text, "projection_dim": embedding},
        vision_config={**shared, **vision, "projection_dim": embedding},
        projection_dim=embedding,
    )


def _tower(tensors: Mapping[str, Tensor], blocks: str, width: int) -> dict[str, int]:
    depth = 1 + max(int(name[len(blocks) + 1 :].split(".")[0]) for name in tensors if name.startswith(blocks + "."))
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": len(tensors[f"{blocks}.0.mlp.c_fc.weight"]),
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        start, fused, kind = name.partition(".attn.in_proj_")
        if fused:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed.update({f"{start}.self_attn.{part}_proj.{kind}": x.clone() for part, x in parts})
        else:
            renamed[name] = tensor
    return renamed
