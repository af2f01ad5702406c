"""Reading of prompts by text encoders."""

import warnings
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor


def tokens(tokenizer: Any, prompt: str, length: int, warn: bool = True) -> Any:
    """Tokenize one prompt as a batch of one, padded or cut to `length` tokens, with a warning if it is cut.

    A textual inversion of several vectors is expanded to its tokens, as diffusers does.
    """
    prompt = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    words = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if warn and len(words) > length:
        warnings.warn(f"the model reads {length} tokens and cuts: {prompt}", stacklevel=6)
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def read_clip(encoder: Any, words: Any) -> tuple[Tensor, Tensor]:
    """Return a CLIP text encoder's last hidden state but one, `(tokens, width)`, and its first output's first row."""
    output = encoder(words.input_ids.to(next(encoder.parameters()).device), output_hidden_states=True)
    return output.hidden_states[-2][0], output[0][0]
