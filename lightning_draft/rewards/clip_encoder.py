"""CLIP of transformers as a frozen, differentiable feature extractor that reads its own preprocessing."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_draft.assets import resolve
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.precision import full_precision

Precision = Literal["float32", "bfloat16", "float16"]

MAX_CACHED = 65536
_CHUNK = 256
_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """A CLIP image processor as tensor arithmetic: resize, centre crop, normalise.

    Args:
        shortest: Length in pixels to which the shortest side is resized; or the size (height, width); or None.
        crop: Height and width of the crop; None for none. Images that are smaller are padded with black.
        mean: Subtracted, by channel.
        std: Divided by, by channel.
        mode: Interpolation, always with antialiasing.
        scale: Factor of images in [0, 1] before the mean is subtracted.
    """

    shortest: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    scale: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read an image processor's configuration.

        Raises:
            ConfigurationError: It asks for a resize that is not bilinear or bicubic, or by the longest edge.
        """
        mode = _MODES.get(config.get("resample", 3))
        size = config.get("size", 224)
        if mode is None or (isinstance(size, Mapping) and "longest_edge" in size):
            raise ConfigurationError(
                f"the image processor resizes to size={size} with resample={config.get('resample')}; supported are "
                "shortest_edge or height and width, with resample 2 (bilinear) or 3 (bicubic)"
            )
        if isinstance(size, Mapping):
            size = size["shortest_edge"] if "shortest_edge" in size else _pair(size)
        normalise = config.get("do_normalize", True)
        return cls(
            shortest=size if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            mean=tuple(config["image_mean"]) if normalise else (0.0,) * 3,
            std=tuple(config["image_std"]) if normalise else (1.0,) * 3,
            mode=mode,
            scale=255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to the network's input, in the same dtype."""
        height, width = images.shape[-2:]
        size = self._resized(height, width)
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=True)
        if self.crop is not None:
            images = F.pad(images, (*_margins(size[1], self.crop[1]), *_margins(size[0], self.crop[0])))
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * self.scale - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest is None:
            return height, width
        if not isinstance(self.shortest, int):
            return self.shortest
        if height <= width:
            return self.shortest, int(self.shortest * width / height)
        return int(self.shortest * height / width), self.shortest


class CLIPEncoder(nn.Module):
    """The two towers of a CLIP, frozen; features have length 1.

    Args:
        pretrained: Folder or hub id of a transformers `CLIPModel` with its tokenizer and image processor, or the
            shipped name `emoji-clip`.
        dtype: Precision of the weights; features come in the precision of the images, at least float32.

    Raises:
        ConfigurationError: Nothing is there, or it is not a CLIP, or it is incomplete.
    """

    def __init__(self, pretrained: str, dtype: Precision = "float32") -> None:
        super().__init__()
        if dtype not in get_args(Precision):
            raise ConfigurationError(f"dtype={dtype!r} is not supported; write {', '.join(get_args(Precision))}")
        model, self.tokenizer, processor = _load(pretrained)
        self.model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.preprocess = Preprocessing.from_config(processor)
        self.max_length = min(self.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> float:
        """The factor of cosines that the model was trained with."""
        return float(self.model.logit_scale.float().exp())

    def images(self, images: Tensor) -> Tensor:
        """Features `(B, D)` of images `(B, 3, H, W)` in [0, 1], with their gradient."""
        with full_precision(images) as x:
            pixels = self.preprocess(x).to(self.model.dtype)
            return F.normalize(_tensor(self.model.get_image_features(pixel_values=pixels)).to(x.dtype), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features `(N, D)` of texts, without a graph; each text is encoded once."""
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
        with full_precision(self.model.logit_scale) as precision:
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return F.normalize(_tensor(features).to(precision.dtype), dim=-1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Forget the features when the weights move or change their precision."""
        self._texts.clear()
        return super()._apply(fn, recurse)


def _tensor(output: Any) -> Tensor:
    """Features as transformers 4 (a tensor) and 5 (an object) return them."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _load(pretrained: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and the image processor's configuration."""
    from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel

    source = resolve(pretrained)
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"it holds a model of type {config.model_type!r}")
        with _no_progress_bar():
            model, report = CLIPModel.from_pretrained(source, weights_only=True, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        return model, AutoTokenizer.from_pretrained(source), _image_processor(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"no CLIP could be read from {pretrained!r}: {reason}; give the folder or hub id of a transformers "
            "CLIPModel with its tokenizer and image processor, such as openai/clip-vit-base-patch32, or emoji-clip"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _image_processor(source: Path | str) -> dict[str, Any]:
    """The image processor's configuration, from its own file (transformers 4) or the processor's (5)."""
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


def _pair(size: Mapping[str, int] | int) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _margins(length: int, crop: int) -> tuple[int, int]:
    """Padding before and after that makes `crop` of `length`; negative where it cuts."""
    before = -((length - crop) // 2) if crop <= length else math.ceil((crop - length) / 2)
    return before, crop - length - before
