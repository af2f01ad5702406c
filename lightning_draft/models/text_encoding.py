"""Options of the text encoders."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from lightning_draft.arguments import in_range, integer, integer_at_least
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.family import Family


@dataclass(frozen=True)
class TextEncoding:
    """How prompts are embedded.

    Args:
        max_length: Number of tokens that the last text encoder (a T5 or a language model) reads; longer prompts are
            truncated with a warning. By default the published number. A CLIP always reads 77.
        clip_skip: Number of CLIP's last layers to skip, for prompts and not for the negative prompt, as in diffusers.
        cache: Folder in which embeddings are kept, by text encoder and prompt. The text encoders are then loaded only
            while prompts are embedded that are not in it. `fit` and `validate` embed all prompts before the other
            networks are loaded.
    """

    max_length: int | None = None
    clip_skip: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None:
            integer("text.max_length", self.max_length, "leave it out for the published number")
        integer_at_least("text.clip_skip", self.clip_skip, 0, "write 0 for the published embedding")
        if self.cache is not None and not _is_folder_name(self.cache):
            raise ConfigurationError(
                f"text.cache={self.cache!r} is not the name of a folder; write a name such as embeddings, or null for "
                "no cache on the disk"
            )

    def check(self, family: Family) -> None:
        """Check the options against a family.

        Raises:
            ConfigurationError: The family does not support them.
        """
        if self.clip_skip and not family.clip_skip:
            raise ConfigurationError(
                f"text.clip_skip={self.clip_skip} has no effect on {family.title}, which does not read CLIP's hidden "
                "states; leave it out"
            )
        if self.cache is not None and not family.text_encoders:
            raise ConfigurationError(
                f"text.cache={self.cache!r} has no effect on {family.title}, which has no text encoder; leave it out"
            )
        if self.max_length is None:
            return
        if family.max_text_length is None:
            raise ConfigurationError(
                f"text.max_length={self.max_length} has no effect on {family.title}, whose text encoders read a fixed "
                "number of tokens; leave it out"
            )
        in_range("text.max_length", self.max_length, 1, family.max_text_length, f"write {family.text_length}")

    def check_layers(self, layers: int) -> None:
        """Check the options against the number of layers of the smallest CLIP.

        Raises:
            ConfigurationError: More layers are to be skipped than there are.
        """
        in_range("text.clip_skip", self.clip_skip, 0, layers - 1, "write 1, or 0 for the published embedding")


def _is_folder_name(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value).strip()) and "\0" not in str(value)


def as_chat(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """Return a prompt as the user's message in the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer of a language model.
        prompt: The text.
        thinking: Whether the answer starts with the model's thoughts.
    """
    messages = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    text: str = tokenizer.apply_chat_template(messages, **options)
    return text


def warn_if_cut(tokenizer: Any, prompt: str, length: int, text: str) -> None:
    """Warn if the text of a prompt, with its chat template if there is one, has more tokens than are read."""
    # A textual inversion with several vectors is replaced by the same number of tokens.
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    if len(tokenizer(converted, truncation=False, verbose=False)["input_ids"]) > length:
        warnings.warn(f"the model reads {length} tokens and truncates the prompt: {prompt}", stacklevel=6)


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Within this context the libraries log only errors: they would report each truncated prompt for each encoder."""
    loggers = (diffusers_logging, transformers_logging)
    # Setting a level is slow, because it clears the caches of all loggers of the process.
    changed = [(logger, level) for logger in loggers if (level := logger.get_verbosity()) != logger.ERROR]
    for logger, _ in changed:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in changed:
            logger.set_verbosity(level)
