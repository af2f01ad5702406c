"""Rewards from CLIP: similarity to the prompt, and classification of the prompt among captions.

References:
    Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718 (CLIPScore, equation 1).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.clip_encoder import CLIPEncoder
from lightning_draft.rewards.precision import Precision, full_precision
from lightning_draft.rewards.targets import target_values


class CLIPScore(Reward):
    """Cosine between the CLIP features of image and prompt, in [-1, 1]; no prefix is added to the prompt.

    OpenAI's models give about 0.25 to 0.35 for matching photographs and 0.1 to 0.2 for others.

    Args:
        pretrained: Folder or hub id of a transformers CLIP, or the shipped name `emoji64-clip`.
        variant: `cosine`; or `clipscore` for `2.5 max(cosine, 0)`, in [0, 2.5], whose gradient is 0 for negative
            cosines.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The variant is not known, or the CLIP cannot be read.
    """

    def __init__(
        self, pretrained: str, variant: Literal["cosine", "clipscore"] = "cosine", dtype: Precision = "float32"
    ) -> None:
        super().__init__()
        if variant not in ("cosine", "clipscore"):
            raise ConfigurationError(f"variant={variant!r} is not known; write cosine or clipscore")
        self.pretrained = pretrained
        self.variant = variant
        self.encoder = CLIPEncoder.load(pretrained, dtype)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        cosine = self.encoder.similarity(images, prompts)
        return cosine if self.variant == "cosine" else 2.5 * cosine.clamp(min=0)


class CLIPClassification(Reward):
    """`log p(prompt | image)` by CLIP's softmax over captions, `s_prompt - logsumexp(s)`, at most 0.

    `s` are the cosines times CLIP's logit scale. Unlike a cosine, the reward does not rise if the similarity to all
    texts rises. The candidates are the captions and the prompt; a caption that equals the prompt up to case and spaces
    counts once. Chance is `-log(N)` for N candidates.

    Args:
        pretrained: Folder or hub id of a transformers CLIP, or the shipped name `emoji64-clip`.
        captions: The other captions: a list, or any source that `PromptDataModule` reads (a file, the name of a shipped
            list).
        dtype: Precision of the frozen weights.
        column: Metadata of the prompt with the correct caption; by default the prompt itself.

    Raises:
        ConfigurationError: There are no captions, or the CLIP cannot be read.
    """

    def __init__(
        self, pretrained: str, captions: list[str] | str, dtype: Precision = "float32", column: str | None = None
    ) -> None:
        from lightning_draft.prompt_sources import read_prompts

        super().__init__()
        self.pretrained = pretrained
        self.column = column
        self.captions = list({_key(caption): str(caption) for caption in read_prompts(captions)}.values())
        self._columns = {_key(caption): column for column, caption in enumerate(self.captions)}
        self.encoder = CLIPEncoder.load(pretrained, dtype)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        own, others = self.logits(images, prompts)
        return own - torch.cat([own.unsqueeze(1), others], 1).logsumexp(1)

    def logits(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return scaled cosines with prompts `(B,)` and captions `(B, N)`, -inf for captions equal to the prompt."""
        if self.column is not None:
            prompts = target_values(prompts, self.column, None, type(self).__name__)
        with full_precision(images):
            features = self.encoder.images(images) * self.encoder.logit_scale
            own = (features * self.encoder.texts(prompts).to(features)).sum(-1)
            others = features @ self.encoder.texts(self.captions).to(features).T
        column = torch.tensor([self._columns.get(_key(prompt), -1) for prompt in prompts], device=others.device)
        same = column.unsqueeze(1) == torch.arange(len(self.captions), device=others.device)
        return own, others.masked_fill(same, -torch.inf)


class CaptionRetrieval(CLIPClassification):
    """1 if the prompt is more similar to the image than every other caption, else 0. Black box.

    The mean over images is the top-1 retrieval accuracy.

    Args:
        pretrained: Folder or hub id of a transformers CLIP, or the shipped name `emoji64-clip`.
        captions: The other captions: a list, or any source that `PromptDataModule` reads (a file, the name of a shipped
            list).
        dtype: Precision of the frozen weights.
        column: Metadata of the prompt with the correct caption; by default the prompt itself.
    """

    differentiable = False

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        own, others = self.logits(images, prompts)
        return (own > others.amax(1)).float()


def _key(caption: str) -> str:
    """Return the caption without the differences that CLIP's tokenizers ignore."""
    return " ".join(caption.lower().split())
