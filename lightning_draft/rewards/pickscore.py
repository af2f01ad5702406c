"""PickScore: a CLIP trained to predict which of two images people prefer.

References:
    Kirstain et al., arXiv:2305.01569 (Pick-a-Pic), equation 1.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.clip_encoder import CLIPEncoder
from lightning_draft.rewards.precision import Precision

_EXPECTED = (
    "yuvalkirstain/PickScore_v1 (config.json, model.safetensors) as `pretrained`, and of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K (tokenizer, preprocessor_config.json) as `processor`"
)


class PickScore(Reward):
    """`exp(logit_scale) cos(image, prompt)` of a CLIP ViT-H-14 fine-tuned on Pick-a-Pic, in [-100, 100].

    Generated images score about 18 to 24. An increase by 1 multiplies the odds of being preferred by `e`.

    Args:
        pretrained: Folder or hub id of the transformers CLIP; the published one is 4 GB in single precision.
        processor: Folder or hub id of the tokenizer and image processor of its training.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: Model or processor cannot be read, or do not belong to a CLIP.
    """

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.encoder = CLIPEncoder.load(pretrained, dtype, processor, _EXPECTED)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        return self.encoder.logit_scale * self.encoder.similarity(images, prompts)
