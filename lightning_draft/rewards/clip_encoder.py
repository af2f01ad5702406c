"""CLIP models of transformers as frozen, differentiable encoders with the preprocessing of their own configuration."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_draft.rewards.precision import Precision, check_precision, default_dtype, full_precision
from lightning_draft.rewards.preprocessing import Preprocessing
from lightning_draft.rewards.pretrained import load, reading

MAX_CACHED = 65536
_CHUNK = 256
_EXPECTED = (
    "a transformers CLIPModel with its tokenizer and image processor, such as openai/clip-vit-base-patch32, or "
    "emoji64-clip"
)


class ImageEncoder(nn.Module):
    """Frozen image encoder of a CLIP; features have length 1.

    Args:
        model: A `CLIPVisionModelWithProjection` of transformers.
        preprocess: Images `(B, 3, H, W)` in [0, 1] to the network's input, differentiably.
        dtype: Precision of the weights; features come in the precision of the images, at least float32.

    Raises:
        ConfigurationError: The precision is not known.
    """

    def __init__(self, model: Any, preprocess: Callable[[Tensor], Tensor], dtype: Precision = "float32") -> None:
        super().__init__()
        check_precision(dtype)
        self.model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.preprocess = preprocess

    @classmethod
    def load(cls, pretrained: str, dtype: Precision = "float32") -> Self:
        """Read the image encoder of a transformers `CLIPModel`, and its image processor.

        Args:
            pretrained: Folder or hub id, or the shipped name `emoji64-clip`.
            dtype: Precision of the weights.

        Raises:
            ConfigurationError: The model is missing, incomplete, or not a CLIP.
        """
        from transformers import CLIPVisionModelWithProjection

        check_precision(dtype)
        with reading("CLIP", pretrained, _EXPECTED) as source:
            config = _clip_config(source)
            vision = config.vision_config
            vision.projection_dim = config.projection_dim
            model = load(CLIPVisionModelWithProjection, source, vision)
            processor = _image_processor(source)
        return cls(model, Preprocessing.from_config(processor), dtype)

    def images(self, images: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` in [0, 1] to features `(B, D)`, with gradient."""
        with full_precision(images) as x:
            return F.normalize(self._features(self.preprocess(x).to(self.model.dtype)).to(x.dtype), dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=pixels).image_embeds
        return features


class CLIPEncoder(ImageEncoder):
    """Frozen image and text encoder of a CLIP; features have length 1.

    Args:
        model: A `CLIPModel` of transformers.
        tokenizer: Its tokenizer.
        preprocess: Images `(B, 3, H, W)` in [0, 1] to the network's input, differentiably.
        dtype: Precision of the weights; features come in the precision of the images, at least float32.

    Attributes:
        logit_scale: Factor of the cosines in the training loss.

    Raises:
        ConfigurationError: The precision is not known.
    """

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Callable[[Tensor], Tensor], dtype: Precision = "float32"
    ) -> None:
        logit_scale = float(model.logit_scale.detach().float().exp())  # before the cast: bfloat16 changes it by 1 %
        super().__init__(model, preprocess, dtype)
        self.logit_scale = logit_scale
        self.tokenizer = tokenizer
        self.max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls, pretrained: str, dtype: Precision = "float32", processor: str | None = None, expected: str = _EXPECTED
    ) -> Self:
        """Read a transformers `CLIPModel` with its tokenizer and image processor.

        Args:
            pretrained: Folder or hub id, or the shipped name `emoji64-clip`.
            dtype: Precision of the weights.
            processor: Folder or hub id of the tokenizer and image processor; None if they are with the model.
            expected: What can be given, for messages.

        Raises:
            ConfigurationError: The model is missing, incomplete, or not a CLIP.
        """
        from transformers import CLIPModel

        check_precision(dtype)
        with reading("CLIP", pretrained, expected) as source:
            model = load(CLIPModel, source, _clip_config(source))
        with reading("CLIP", processor or pretrained, expected) as source:
            tokenizer, config = read_tokenizer(source), _image_processor(source)
        return cls(model, tokenizer, Preprocessing.from_config(config), dtype)

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute the cosine `(B,)` of each image `(B, 3, H, W)` with its prompt, in [-1, 1]."""
        with full_precision(images):
            features = self.images(images)
            return (features * self.texts(prompts).to(features)).sum(-1)

    def _features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to features `(N, D)`, without gradient; features are cached."""
        keys = [str(text) for text in texts]
        known = {key: self._texts[key] for key in keys if key in self._texts}
        unknown = [key for key in dict.fromkeys(keys) if key not in known]
        for start in range(0, len(unknown), _CHUNK):
            chunk = unknown[start : start + _CHUNK]
            known.update(zip(chunk, self._encode(chunk), strict=True))
        self._texts.update(known)
        while len(self._texts) > MAX_CACHED:
            del self._texts[next(iter(self._texts))]
        return torch.stack([known[key] for key in keys])

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        # transformers 4 builds its masks in the default dtype, not in that of the model.
        with full_precision(self.model.logit_scale) as precision, default_dtype(precision.dtype):
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return F.normalize(_tensor(features).to(precision.dtype), dim=-1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Clear the cached features when the weights change their device or precision."""
        self._texts.clear()
        module: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return module


def _tensor(output: Any) -> Tensor:
    """Return the features from the output of transformers 4 (a tensor) or 5 (an object)."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def read_tokenizer(source: Path | str) -> Any:
    """Read the tokenizer of a folder or hub id.

    Raises:
        OSError: There is none.
        ValueError: It cannot be read.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _clip_config(source: Path | str) -> Any:
    from transformers import AutoConfig, CLIPConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"it contains a model of type {config.model_type!r}")
    return config


def _image_processor(source: Path | str) -> dict[str, Any]:
    """Read the image processor's configuration, from its own file (transformers 4) or the processor's (5)."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            config: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            if "image_mean" in config:
                return config
    raise ValueError(
        "it has no preprocessor_config.json and no image processor in processor_config.json; "
        "transformers.CLIPImageProcessor(...).save_pretrained(folder) writes one"
    )
