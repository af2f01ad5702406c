"""Object detectors of transformers as frozen, differentiable networks that return logits."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.image_processor import PixelValues, read_image_processor
from lightning_draft.rewards.precision import Precision, check_precision, default_dtype, full_precision
from lightning_draft.rewards.pretrained import load, reading
from lightning_draft.rewards.targets import Labels

TEXT_DETECTORS = ("owlvit", "owlv2")
_EXPECTED = "a detector as transformers saves it, such as google/owlv2-base-patch16-ensemble or hustvl/yolos-tiny"


class Detector(nn.Module, ABC):
    """A frozen detector.

    Args:
        model: A detector of transformers.
        processor: Its image processor.
        dtype: Precision of the weights.
    """

    threshold: float
    """Default score threshold of transformers' post-processing for this kind of detector."""

    def __init__(self, model: Any, processor: Any, dtype: Precision) -> None:
        super().__init__()
        self.model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.processor = processor
        self.pixels = PixelValues(processor.to_dict())

    def forward(self, images: Tensor, objects: Sequence[Any]) -> Tensor:
        """Compute the log-odds `(B, Q)` that each of Q boxes contains the object of its image.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            objects: `B` objects.
        """
        with full_precision(images) as x:
            return self.logits(self.pixels(x).to(self.model.dtype), objects).to(x.dtype)

    @abstractmethod
    def logits(self, pixels: Tensor, objects: Sequence[Any]) -> Tensor:
        """Compute the log-odds `(B, Q)` from the network's input."""

    def check(self, name: str) -> None:
        """Check that the detector has a label of this name.

        Raises:
            ConfigurationError: It has none.
        """

    @abstractmethod
    def count(self, images: Tensor, objects: Sequence[Any], threshold: float) -> Tensor:
        """Count the boxes of each image's object that remain after transformers' post-processing, `(B,)`."""


class TextDetector(Detector):
    """OWL-ViT or OWLv2: objects are given by text.

    Args:
        model: `OwlViTForObjectDetection` or `Owlv2ForObjectDetection`.
        processor: Its image processor.
        dtype: Precision of the weights.
        tokenizer: The tokenizer of its text encoder.
        query: Text in which `{}` stands for the object.
    """

    threshold = 0.1

    def __init__(self, model: Any, processor: Any, dtype: Precision, tokenizer: Any, query: str) -> None:
        super().__init__(model, processor, dtype)
        self.tokenizer = tokenizer
        self.query = query

    def logits(self, pixels: Tensor, objects: Sequence[Any]) -> Tensor:
        """Apply the class head without its query mask, because the mask would cast to float32."""
        return self._patches(pixels, objects)[0]

    @torch.no_grad()
    def count(self, images: Tensor, objects: Sequence[Any], threshold: float) -> Tensor:
        """Count boxes above the threshold; OWL's post-processing does not suppress overlapping ones."""
        with full_precision(images) as x:
            logits, features, grid = self._patches(self.pixels(x).to(self.model.dtype), objects)
            output = SimpleNamespace(logits=logits.unsqueeze(-1), pred_boxes=self.model.box_predictor(features, grid))
        found = self.processor.post_process_object_detection(output, threshold=threshold)
        return images.new_tensor([len(boxes["scores"]) for boxes in found], dtype=torch.float32)

    def _patches(self, pixels: Tensor, objects: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        grid = self.model.image_embedder(pixel_values=pixels)[0]
        features = grid.flatten(1, 2)
        logits = self.model.class_predictor(features, self._queries(objects), None)[0]
        return logits.squeeze(-1), features, grid

    @torch.no_grad()
    def _queries(self, objects: Sequence[Any]) -> Tensor:
        """Encode the text queries to features `(B, 1, D)`."""
        texts = [self.query.replace("{}", str(name)) for name in objects]
        length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        # Attention is causal and the feature is that of the end token, so the padding after it needs no mask.
        with default_dtype(self.model.dtype):  # the dtype of the causal mask in transformers 4
            features = self.model.base_model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device))
        features = features if isinstance(features, Tensor) else features.pooler_output
        return nn.functional.normalize(features, dim=-1).unsqueeze(1)


class LabelDetector(Detector):
    """A detector of the DETR family: an object is one of its labels.

    Args:
        model: A model that `AutoModelForObjectDetection` loads.
        processor: Its image processor.
        dtype: Precision of the weights.
        source: Where it comes from, for messages.
    """

    threshold = 0.5

    def __init__(self, model: Any, processor: Any, dtype: Precision, source: str) -> None:
        super().__init__(model, processor, dtype)
        self.labels = Labels(model.config.id2label, source)

    def check(self, name: str) -> None:
        """Check that the name is one of the labels."""
        self.labels.number(name)

    def logits(self, pixels: Tensor, objects: Sequence[Any]) -> Tensor:
        """Return the logits of a detector with sigmoid outputs, or `log(p / (1 - p))` for one with a softmax."""
        scores = self.model(pixel_values=pixels).logits
        numbers = torch.tensor([self.labels.number(name) for name in objects], device=scores.device)
        column = numbers.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        own: Tensor = scores.gather(-1, column).squeeze(-1)
        if scores.shape[-1] == len(self.labels.names):
            return own
        others: Tensor = scores.scatter(-1, column, -torch.inf).logsumexp(-1)
        return own - others

    @torch.no_grad()
    def count(self, images: Tensor, objects: Sequence[Any], threshold: float) -> Tensor:
        """Count boxes above the threshold with the object's label."""
        with full_precision(images) as x:
            output = self.model(pixel_values=self.pixels(x).to(self.model.dtype))
        found = self.processor.post_process_object_detection(output, threshold=threshold)
        numbers = [self.labels.number(name) for name in objects]
        counts = [(boxes["labels"] == number).sum().item() for boxes, number in zip(found, numbers, strict=True)]
        return images.new_tensor(counts, dtype=torch.float32)


def open_detector(pretrained: str, query: str, dtype: Precision) -> Detector:
    """Open a detector.

    Args:
        pretrained: Folder or hub id.
        query: Text in which `{}` stands for the object, for OWL-ViT and OWLv2.
        dtype: Precision of the weights.

    Raises:
        ConfigurationError: It cannot be read, or is not supported.
    """
    from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection, AutoTokenizer

    check_precision(dtype)
    if "{}" not in query:
        raise ConfigurationError(f"query={query!r} has no place for the object; write {{}} there: a photo of a {{}}")
    with reading("detector", pretrained, _EXPECTED) as source:
        by_text = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type in TEXT_DETECTORS
        model = load(AutoModelForZeroShotObjectDetection if by_text else AutoModelForObjectDetection, source)
        processor = read_image_processor(source)
        if by_text:
            return TextDetector(
                model, processor, dtype, AutoTokenizer.from_pretrained(source, trust_remote_code=False), query
            )
        return LabelDetector(model, processor, dtype, pretrained)
