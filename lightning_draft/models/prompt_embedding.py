"""Convert prompts to conditioning with a pipeline's text encoders, and cache the embeddings."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.family import Family
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.text_cache import TextCache
from lightning_draft.models.text_encoding import TextEncoding, only_errors_logged, warn_if_cut
from lightning_draft.progress import Progress

_Key = tuple[str, str]
"""Kind of the prompt, `prompt` or `negative`, and its text."""


class PromptEmbedding(DiffusionModel):
    """Base class for the prompt embedding of pipelines; each prompt is embedded once and separately.

    Attributes:
        family: The family, which names the text encoders.
        guidance: The guidance, with the negative prompt.
        text: How prompts are embedded.
        device: Device of the conditioning.
        pipeline: The pipeline of diffusers, whose `encode_prompt` reads prompts.
    """

    family: ClassVar[Family]
    guidance: Guidance
    text: TextEncoding
    pipeline: Any

    def __init__(self) -> None:
        super().__init__()
        self._cache: TextCache | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The denoiser's device."""

    @property
    def text_scale(self) -> float:
        """The scale of an update of the text encoders' weights; embeddings are cached for each."""
        return 1.0

    def clear_embeddings(self) -> None:
        """Delete the cached embeddings, after the text encoders have changed."""
        self._cache = None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, and their negative prompts if guidance needs them; each is embedded once and cached.

        Raises:
            RuntimeError: The text encoder was released and a prompt was not precomputed.
        """
        texts, negatives = list(map(str, prompts)), self._negatives_of(prompts)
        with self._encoders_for([*map(_positive, texts), *map(_negative, negatives)]):
            conditioning = self._collate([self._cached(_positive(text)) for text in texts])
            if not negatives:
                return conditioning
            return replace(conditioning, negative=self._collate([self._cached(_negative(each)) for each in negatives]))

    def precompute(
        self, prompts: Iterable[str], device: torch.device | str = "cpu", progress: Progress | None = None
    ) -> None:
        """Embed prompts and negative prompts ahead of time, and cache all of them.

        Args:
            prompts: The prompts.
            device: With `text.cache`: the device of the text encoders, which are loaded for this.
            progress: Called with the number of texts embedded so far and the number to embed, before the first text and
                after each.

        Raises:
            ConfigurationError: The disk has no space for `text.cache`.
        """
        prompts = list(prompts)
        self.guidance.check_negative_column(prompts)
        texts = dict.fromkeys(map(str, prompts))
        negatives = dict.fromkeys([self.guidance.negative_prompt, *self._negatives_of(prompts)])
        keys = [*map(_negative, negatives), *map(_positive, texts)]
        with only_errors_logged(), self._encoders_for(keys, device):
            missing = [key for key in keys if self._key(key) not in self._embeddings]
            size = 0
            for count, key in enumerate(missing):
                if progress is not None:
                    progress(count, len(missing))
                size += sum(tensor.nbytes for tensor in self._cached(key, keep=True).values())
                self._embeddings.check_space(size // (count + 1) * (len(missing) - count - 1))
            if progress is not None and missing:
                progress(len(missing), len(missing))

    @contextmanager
    def loaded_text_encoders(self, device: torch.device | str = "cpu") -> Iterator[dict[str, nn.Module]]:
        """Within this context, a model with `text.cache` has its text encoders, which it yields by name.

        Args:
            device: Their device.
        """
        self._load_text_encoders(device)
        try:
            present = {name: getattr(self, name) for name in self.family.text_encoders}
            yield {name.replace("_", " "): each for name, each in present.items() if each is not None}
        finally:
            self._drop_text_encoders()

    def default_prompts(self, count: int) -> list[str]:
        """Return at most `count` prompts for images without given prompts; a model that reads text has none."""
        return []

    def release_text_encoder(self) -> None:
        """Free the text encoders' memory; afterwards only prompts with cached embeddings can be used."""
        negative = _negative(self.guidance.negative_prompt)
        with self._encoders_for([negative]):
            self._cached(negative, keep=True)
        self._drop_text_encoders()

    @abstractmethod
    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Embed one prompt; return the inputs of `_network` by name, without a batch dimension.

        Args:
            prompt: The text.
            negative: Whether it is the negative prompt.
        """

    def _text_of(self, prompt: str) -> str:
        """Return the text that the last tokenizer receives for a prompt; a family with a chat template overrides it."""
        return prompt

    def _collate(self, embeddings: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Join the embeddings of single prompts: stacked, or with `ragged_text` of the family as tuples."""
        columns = {name: [each[name].to(self.device) for each in embeddings] for name in embeddings[0]}
        if self.family.ragged_text:
            return Conditioning({}, {name: tuple(column) for name, column in columns.items()})
        return Conditioning({name: torch.stack(column) for name, column in columns.items()})

    @property
    def _text_device(self) -> torch.device:
        """The device of the text encoders."""
        encoder = self._last_encoder
        device: torch.device = self.device if encoder is None else next(encoder[1].parameters()).device
        return device

    @property
    def _text_length(self) -> int:
        """Number of tokens that the last text encoder reads, if it can be chosen."""
        return self.text.max_length or self.family.text_length or 0

    @property
    def _last_encoder(self) -> tuple[str, Any] | None:
        """Name and network of the last loaded text encoder."""
        present = [(name, each) for name in self.family.text_encoders if (each := getattr(self, name)) is not None]
        return present[-1] if present else None

    def _open_cache(self) -> TextCache:
        """Return a new cache."""
        return TextCache()

    def _load_text_encoders(self, device: torch.device | str) -> None:
        """Load the text encoders, which a model with `text.cache` does not keep."""
        raise NotImplementedError(f"{type(self).__name__} cannot load its text encoders again")

    def _drop_text_encoders(self) -> None:
        for name in self.family.text_encoders:
            setattr(self, name, None)
            setattr(self.pipeline, name, None)

    @contextmanager
    def _encoders_for(self, prompts: Sequence[_Key], device: torch.device | str = "cpu") -> Iterator[None]:
        """Within this context, a model with `text.cache` has its text encoders if an embedding is missing."""

        def missing() -> bool:
            return any(self._key(each) not in self._embeddings for each in prompts)

        if self.text.cache is None or self._last_encoder is not None or not missing():
            yield
            return
        with self._embeddings.writing():
            if missing():  # unless another process has embedded them meanwhile
                self._load_text_encoders(device)
            try:
                yield
            finally:
                self._drop_text_encoders()

    @property
    def _embeddings(self) -> TextCache:
        if self._cache is None:
            self._cache = self._open_cache()
        return self._cache

    def _negatives_of(self, prompts: Iterable[str]) -> list[str]:
        """Return the negative prompts of prompts; empty without guidance."""
        return [self.guidance.negative_prompt_of(prompt) for prompt in prompts] if self.guidance.enabled else []

    def _key(self, prompt: _Key) -> tuple[str, str, float]:
        return (*prompt, self.text_scale)

    def _cached(self, key: _Key, keep: bool = False) -> Mapping[str, Tensor]:
        encoder, scaled_key = self._last_encoder, self._key(key)

        def embed() -> Mapping[str, Tensor]:
            return self._embed(key[1], negative=key[0] == "negative")

        if scaled_key not in self._embeddings and self.family.text_encoders:
            if encoder is None:
                raise RuntimeError(
                    f"the text encoder was released and {key[1]!r} has no embedding; pass all prompts, including "
                    "those of validation and of the sample logger, to precompute() before release_text_encoder()"
                )
            self._warn_if_cut(encoder[0].replace("text_encoder", "tokenizer"), key[1])
            with only_errors_logged():
                return self._embeddings.get(scaled_key, embed, self._text_device.type, keep)
        return self._embeddings.get(scaled_key, embed, self._text_device.type, keep)

    def _warn_if_cut(self, name: str, prompt: str) -> None:
        tokenizer = getattr(self.pipeline, name)
        length = min(tokenizer.model_max_length, self._text_length or tokenizer.model_max_length)
        warn_if_cut(tokenizer, prompt, length, self._text_of(prompt))


def _positive(prompt: str) -> _Key:
    return ("prompt", prompt)


def _negative(prompt: str) -> _Key:
    return ("negative", prompt)
