"""Human Preference Score v2 and v2.1.

References:
    Wu et al., arXiv:2306.09341 (HPSv2), and the `hpsv2` package, which computes the same score.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_draft.arguments import boolean
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.clip_encoder import CLIPEncoder, read_tokenizer
from lightning_draft.rewards.open_clip import clean_text, clip_from_open_clip
from lightning_draft.rewards.precision import Precision, check_precision
from lightning_draft.rewards.preprocessing import LongestSide
from lightning_draft.rewards.weights import PublishedFile, find_file, read_tensors

HPSVersion = Literal["v2.0", "v2.1"]

HPS_FILES = {
    "v2.0": PublishedFile("xswu/HPSv2", "HPS_v2_compressed.pt"),
    "v2.1": PublishedFile("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
}
HPS_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_HEADS = 16
"""Attention heads of both towers of ViT-H-14."""


class HPSv2(Reward):
    """`cos(image, prompt)` of a CLIP ViT-H-14 that was fine-tuned on human preferences, in [-1, 1].

    The authors' benchmark, which prints 100 times this value, has means from 0.15 (GLIDE) to 0.31 (SDXL) with v2.1,
    and from 0.24 to 0.28 with v2.0. The longest side is resized to 224 pixels and the rest is padded with black.

    The published open_clip checkpoint (2 GB, downloaded once) is converted; the `hpsv2` package and LAION's base
    weights are not needed.

    Args:
        version: `v2.1`, trained on more and cleaner preferences, or `v2.0`, the version of the paper. Their scores are
            not comparable.
        weights: The checkpoint or its folder; None for the hub's cache or a download.
        tokenizer: Folder or hub id of CLIP's tokenizer.
        dtype: Precision of the frozen weights.
        antialias: Whether downsampling is antialiased, as in torchvision's tensor resize since version 0.17; older
            published scores were computed without antialiasing.

    Raises:
        ConfigurationError: The version is not known, or weights or tokenizer are missing or of another model.
    """

    def __init__(
        self,
        version: HPSVersion = "v2.1",
        weights: str | None = None,
        tokenizer: str = HPS_TOKENIZER,
        dtype: Precision = "float32",
        antialias: bool = True,
    ) -> None:
        super().__init__()
        check_precision(dtype)
        boolean("antialias", antialias)
        path = find_file(hps_file(version), weights)
        model = clip_from_open_clip(read_tensors(path, "state_dict"), HPS_HEADS, path)
        preprocess = LongestSide(model.config.vision_config.image_size, antialias)
        words = clip_tokenizer(tokenizer, model.config.text_config.vocab_size)
        self.encoder = CLIPEncoder(model, words, preprocess, dtype)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        return self.encoder.similarity(images, [clean_text(prompt) for prompt in prompts])


def hps_file(version: str) -> PublishedFile:
    """Return the published checkpoint of a version.

    Raises:
        ConfigurationError: The version is not known.
    """
    if version not in HPS_FILES:
        raise ConfigurationError(f"version={version!r} of HPSv2 is not known; write v2.0 or v2.1")
    return HPS_FILES[version]


def clip_tokenizer(name: str, vocabulary: int) -> Any:
    """Read CLIP's byte-pair tokenizer.

    Args:
        name: Folder or hub id.
        vocabulary: Number of tokens of the model; the last one is the end token.

    Raises:
        ConfigurationError: It cannot be read, or has another end token.
    """
    advice = (
        "give the folder or hub id of CLIP's tokenizer, such as openai/clip-vit-large-patch14; of its files "
        "vocab.json, merges.txt and tokenizer_config.json are enough"
    )
    try:
        tokenizer = read_tokenizer(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(f"tokenizer={name!r} cannot be read: {reason}; {advice}") from error
    if tokenizer.eos_token_id != vocabulary - 1:
        raise ConfigurationError(
            f"tokenizer={name!r} ends texts with token {tokenizer.eos_token_id} and the weights expect "
            f"{vocabulary - 1}; {advice}"
        )
    return tokenizer
