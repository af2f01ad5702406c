"""The `hpsv2` package as a black-box reward, as a reference for `HPSv2`; `HPSv2` itself does not need the package.

`pip install hpsv2` pins a version of protobuf that is too old for TensorBoard and replaces pytest. Its wheel lacks the
vocabulary of its tokenizer and imports the module `turtle`, which needs tkinter. It downloads 4 GB of weights and then
overwrites them. These commands install it beside current packages without these effects:

    pip install --no-deps hpsv2==1.2.0
    pip install 'lightning-draft[hpsv2]'

with the version of torchvision that belongs to the installed torch.
"""

import gzip
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.hps import HPS_TOKENIZER, HPSVersion, clip_tokenizer, hps_file
from lightning_draft.rewards.precision import full_precision
from lightning_draft.rewards.weights import find_file, load_state, read_tensors

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_INSTALL = (
    "pip install --no-deps hpsv2==1.2.0 and then pip install 'lightning-draft[hpsv2]', with the torchvision version of "
    "your torch; the reward HPSv2 computes the same score without these packages"
)


class HPSv2Reference(Reward):
    """Score with the `hpsv2` package, one image at a time. Black box.

    Model, preprocessing and tokenizer are those of the `hpsv2` package; images are rounded to bytes, as in image files.
    The checkpoint is read by lightning-draft, without running code.

    Args:
        version: `v2.1` or `v2.0`.
        weights: The checkpoint or its folder; None for the hub's cache or a download.
        tokenizer: Folder or hub id of CLIP's tokenizer, which has the vocabulary that the package lacks.
        architecture: The package's name for the model's sizes.

    Raises:
        ConfigurationError: The package cannot be imported, or weights or tokenizer are missing or of another model.
    """

    differentiable = False

    def __init__(
        self,
        version: HPSVersion = "v2.1",
        weights: str | None = None,
        tokenizer: str = HPS_TOKENIZER,
        architecture: str = "ViT-H-14",
    ) -> None:
        super().__init__()
        path = find_file(hps_file(version), weights)
        tensors = read_tensors(path, "state_dict")
        merges = bpe_merges(clip_tokenizer(tokenizer, len(tensors["token_embedding.weight"])))
        self.package = import_hpsv2(merges)
        self.model, _, self.preprocess = self.package.create_model_and_transforms(
            architecture, light_augmentation=True, output_dict=True
        )
        load_state(self.model, tensors, path)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        from PIL import Image

        device = self.model.logit_scale.device
        pixels = images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        scores = []
        with full_precision(images):
            for array, prompt in zip(pixels, prompts, strict=True):
                image = self.preprocess(Image.fromarray(array.numpy())).unsqueeze(0).to(device)
                output = self.model(image, self.package.tokenize([str(prompt)]).to(device))
                scores.append((output["image_features"] * output["text_features"]).sum())
        return torch.stack(scores).to(images.device, torch.float32)


def bpe_merges(tokenizer: Any) -> bytes:
    """Return the merges of a byte-pair tokenizer of transformers in the format of CLIP's vocabulary file."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return "\n".join(["#version: 0.2", *lines]).encode()


def import_hpsv2(merges: bytes) -> Any:
    """Import the package's copy of open_clip, with replacements for a file and a module that may be missing.

    Args:
        merges: Content of the missing vocabulary file.

    Raises:
        ConfigurationError: The package, or something else that it imports, is not installed.
    """
    import importlib

    try:
        with _patched_imports(merges):
            return importlib.import_module("hpsv2.src.open_clip")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(f"HPSv2Reference cannot import the hpsv2 package ({reason}); {_INSTALL}") from error


@contextmanager
def _patched_imports(merges: bytes) -> Iterator[None]:
    """Provide the vocabulary file and a module `turtle` without tkinter within this context."""

    def opened(file: Any, *arguments: Any, **options: Any) -> Any:
        """Open a compressed file, the vocabulary from memory if the package lacks it."""
        if Path(file).name == _VOCABULARY and not Path(file).exists():
            return io.BytesIO(merges)
        return original(file, *arguments, **options)

    original = gzip.open
    turtle = ModuleType("turtle")
    turtle.forward = None  # type: ignore[attr-defined]
    sys.modules.setdefault("turtle", turtle)
    gzip.open = opened  # type: ignore[assignment]
    try:
        yield
    finally:
        gzip.open = original
        if sys.modules["turtle"] is turtle:
            del sys.modules["turtle"]
