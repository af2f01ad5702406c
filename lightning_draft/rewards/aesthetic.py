"""LAION's aesthetic predictors: how people rate an image, regardless of the prompt.

References:
    github.com/LAION-AI/aesthetic-predictor (v1); github.com/christophschuhmann/improved-aesthetic-predictor (v2);
    Black et al., arXiv:2305.13301 (DDPO), the first to fine-tune on it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.clip_encoder import ImageEncoder
from lightning_draft.rewards.precision import Precision, check_precision, full_precision
from lightning_draft.rewards.weights import PublishedFile, find_file, read_tensors

AestheticVersion = Literal["v1", "v2"]

AESTHETIC_FILES = {
    "v1": PublishedFile(
        "LAION-AI/aesthetic-predictor",
        "sa_0_4_vit_l_14_linear.pth",
        4071,
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        host="GitHub",
    ),
    "v2": PublishedFile("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
}
AESTHETIC_ORIGINAL = PublishedFile(
    "christophschuhmann/improved-aesthetic-predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    3_714_759,
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    host="GitHub",
)
"""Version 2 as its author published it; the hub has copies."""

_LAYERS = {"v1": ("",), "v2": ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")}


class AestheticScore(Reward):
    """`w e + b` with CLIP's image embedding `e` of length 1: a mean human rating on a scale of 1 to 10.

    Version 2 consists of five linear layers without non-linearities; they are combined into one affine map.
    Photographs and generated images score about 4 to 7; scores lie within 5.24 +- 18.0 for version 2 and
    3.53 +- 28.5 for version 1. The prompt is ignored.

    Args:
        version: `v2` (`sac+logos+ava1-l14-linearMSE`) or `v1` (`sa_0_4_vit_l_14_linear`).
        pretrained: Folder or hub id of the transformers CLIP whose embedding is scored.
        head: File of the predictor, or its folder; None for the hub's cache or a download. Version 1 is not on the hub.
        dtype: Precision of CLIP's frozen weights.

    Raises:
        ConfigurationError: The version is not known, or a file is missing, damaged or of another size.
    """

    def __init__(
        self,
        version: AestheticVersion = "v2",
        pretrained: str = "openai/clip-vit-large-patch14",
        head: str | None = None,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        if version not in AESTHETIC_FILES:
            raise ConfigurationError(f"version={version!r} is not known; write v1 or v2")
        check_precision(dtype)
        path = find_file(_published(version, head), head, "head")
        self.head = collapse(read_tensors(path), _LAYERS[version], path).requires_grad_(False)
        self.encoder = ImageEncoder.load(pretrained, dtype)
        size = self.encoder.model.config.projection_dim
        if size != self.head.in_features:
            raise ConfigurationError(
                f"the predictor {path} reads embeddings of length {self.head.in_features}, and those of {pretrained!r} "
                f"have length {size}; use the CLIP it was made for, openai/clip-vit-large-patch14"
            )

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` to `(B,)`."""
        with full_precision(images):
            scores: Tensor = self.head(self.encoder.images(images)).squeeze(-1)
            return scores


def collapse(tensors: Mapping[str, Tensor], layers: Sequence[str], source: Path | str) -> nn.Linear:
    """Combine a chain of linear layers into one affine map, in double precision.

    Args:
        tensors: `{layer}weight` and `{layer}bias` of each layer, and no other tensors.
        layers: Prefixes of the layers, first to last.
        source: Where the tensors come from, for messages.

    Raises:
        ConfigurationError: There are other layers, or their sizes do not match, or the output is not one number.
    """
    names = {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}
    if tensors.keys() != names:
        different = ", ".join(sorted(tensors.keys() ^ names)[:3])
        raise ConfigurationError(
            f"{source} does not fit: it differs in {different} from {len(layers)} linear layers; give the file that "
            "the reward names"
        )
    try:
        weight, bias = (tensors[f"{layers[0]}{kind}"].double() for kind in ("weight", "bias"))
        for layer in layers[1:]:
            following = tensors[f"{layer}weight"].double()
            weight, bias = following @ weight, following @ bias + tensors[f"{layer}bias"].double()
        head = nn.Linear(weight.shape[1], 1)
        head.load_state_dict({"weight": weight, "bias": bias})
    except (RuntimeError, IndexError) as error:
        raise ConfigurationError(
            f"{source} does not fit: its layers do not lead from an embedding to one number ({str(error).strip()}); "
            "give the file that the reward names"
        ) from error
    return head


def _published(version: str, head: str | None) -> PublishedFile:
    """Return the file to expect: the author's original if it is in the folder, else the copy on the hub."""
    original = head is not None and (Path(head).expanduser() / AESTHETIC_ORIGINAL.name).is_file()
    named = head is not None and Path(head).name == AESTHETIC_ORIGINAL.name
    return AESTHETIC_ORIGINAL if version == "v2" and (original or named) else AESTHETIC_FILES[version]
