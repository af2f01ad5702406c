"""Models of transformers, read whole and without running code of their repositories."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_draft.assets import resolve
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.clip_encoder import Precision


@contextmanager
def reading(kind: str, pretrained: str, example: str) -> Iterator[Path | str]:
    """Within this context a model is read; yields its folder or hub id.

    Args:
        kind: Of model, for messages.
        pretrained: Folder, hub id or shipped name, as the user gave it.
        example: One that would do.

    Raises:
        ConfigurationError: Something is missing; the message says what and what to give instead.
    """
    try:
        with _quiet():
            yield resolve(pretrained)
    except ConfigurationError:
        raise
    except (OSError, ImportError, KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigurationError(
            f"no {kind} could be read from {pretrained!r}: {reason}; give the folder or hub id of a {kind} as "
            f"transformers saves it, such as {example}"
        ) from error


def load(auto: Any, source: Path | str) -> Any:
    """A model of one of transformers' auto classes, without missing weights.

    Raises:
        OSError, ImportError, ValueError: There is none, or some of its weights are missing.
    """
    model, report = auto.from_pretrained(source, weights_only=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def check_precision(dtype: str) -> None:
    """Check the name of a precision.

    Raises:
        ConfigurationError: It is not known.
    """
    if dtype not in get_args(Precision):
        raise ConfigurationError(f"dtype={dtype!r} is not supported; write {', '.join(get_args(Precision))}")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context tensors that are made without a precision have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no advice on how else the same files could be read."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()
