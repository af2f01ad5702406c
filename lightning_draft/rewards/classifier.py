"""A reward from an image classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.image_processor import PixelValues, read_image_processor
from lightning_draft.rewards.precision import Precision, check_precision, full_precision
from lightning_draft.rewards.pretrained import load, reading
from lightning_draft.rewards.targets import Labels, target_values

_EXPECTED = "an image classifier as transformers saves it, such as google/vit-base-patch16-224"


class ClassifierTarget(Reward):
    """`log p(target | image)` of an image classifier of transformers, at most 0; chance is `-log(number of labels)`.

    Args:
        pretrained: Folder or hub id, such as `google/vit-base-patch16-224` or `microsoft/resnet-50`.
        target: Name or number of the label; by default each prompt's metadata `target`. A label with several names, as
            in ImageNet, is found by each of them.
        dtype: Precision of the frozen weights.

    Raises:
        ConfigurationError: The classifier cannot be read, or has no such label.
    """

    def __init__(self, pretrained: str, target: str | int | None = None, dtype: Precision = "float32") -> None:
        from transformers import AutoModelForImageClassification

        super().__init__()
        self.pretrained = pretrained
        check_precision(dtype)
        with reading("image classifier", pretrained, _EXPECTED) as source:
            model = load(AutoModelForImageClassification, source)
            processor = read_image_processor(source)
        self.model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.pixels = PixelValues(processor.to_dict())
        self.labels = Labels(model.config.id2label, pretrained)
        self.target = target
        if target is not None:
            self.labels.number(target)
        if model.config.problem_type == "multi_label_classification":
            raise ConfigurationError(
                f"{pretrained!r} is a multi-label classifier (multi_label_classification), and this reward needs a "
                "softmax; use a classifier with one label per image"
            )

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)` and `B` prompts to `(B,)`."""
        targets = target_values(prompts, "target", self.target, type(self).__name__)
        numbers = torch.tensor([self.labels.number(target) for target in targets], device=images.device)
        with full_precision(images) as x:
            logits: Tensor = self.model(pixel_values=self.pixels(x).to(self.model.dtype)).logits.to(x.dtype)
            scores: Tensor = logits.log_softmax(-1).gather(1, numbers.unsqueeze(1)).squeeze(1)
            return scores
