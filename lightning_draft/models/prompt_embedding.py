"""Prompts to conditioning, through text encoders and a cache of their embeddings."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.family import Family
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.text_cache import Embedding, TextCache


class PromptEmbedding(DiffusionModel):
    """Base class for the prompt embedding of pipelines; each prompt is embedded once and separately.

    Attributes:
        family: Names the text encoders.
        guidance: Gives the negative prompt.
        device: Where conditioning is needed.
    """

    family: ClassVar[Family]
    guidance: Guidance
    text_encoder: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self._cache = TextCache()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The denoiser's device."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, and the negative prompt where guidance needs it; each is embedded once and then kept.

        Raises:
            RuntimeError: The text encoder was released and a prompt is not among those that were precomputed.
        """
        conditioning = self._collate([self._embedding(str(prompt)) for prompt in prompts])
        if not self.guidance.enabled:
            return conditioning
        return replace(conditioning, negative=self._collate([self._negative_embedding()] * len(prompts)))

    def precompute(self, prompts: Iterable[str]) -> None:
        """Embed prompts, and the negative prompt, ahead of time and keep all of them."""
        self._negative_embedding(keep=True)
        for prompt in dict.fromkeys(map(str, prompts)):
            self._embedding(prompt, keep=True)

    def release_text_encoder(self) -> None:
        """Free the text encoders' memory; from then on only prompts whose embeddings are kept can be used."""
        self._negative_embedding(keep=True)
        for name in self.family.text_encoders:
            setattr(self, name, None)

    @abstractmethod
    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Embed one prompt: what `_network` is given, by name and without a batch dimension."""

    def _embed_negative(self, prompt: str) -> Mapping[str, Tensor]:
        """Embed the negative prompt."""
        return self._embed(prompt)

    def _collate(self, embeddings: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Stack the embeddings of single prompts; a family whose embeddings differ in shape overrides it."""
        return Conditioning(
            {name: torch.stack([each[name] for each in embeddings]).to(self.device) for name in embeddings[0]}
        )

    def _embedding(self, prompt: str, keep: bool = False) -> Mapping[str, Tensor]:
        return self._cached(("prompt", prompt), lambda: self._embed(prompt), keep)

    def _negative_embedding(self, keep: bool = False) -> Mapping[str, Tensor]:
        prompt = self.guidance.negative_prompt
        return self._cached(("negative", prompt), lambda: self._embed_negative(prompt), keep)

    def _cached(self, key: tuple[str, str], embed: Callable[[], Embedding], keep: bool) -> Mapping[str, Tensor]:
        encoder = next((each for name in self.family.text_encoders if (each := getattr(self, name)) is not None), None)
        if encoder is None and key not in self._cache:
            raise RuntimeError(
                f"the text encoder was released and {key[1]!r} has no embedding; pass every prompt, those of "
                "validation and of the sample logger too, to precompute() before release_text_encoder()"
            )
        device = "cpu" if encoder is None else next(encoder.parameters()).device.type
        return self._cache.get(key, embed, device, keep)
