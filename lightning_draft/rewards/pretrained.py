"""Models of transformers, read whole and without running code of their repositories."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_draft.assets import resolve
from lightning_draft.errors import ConfigurationError


@contextmanager
def reading(kind: str, pretrained: str, wanted: str) -> Iterator[Path | str]:
    """Within this context a model is read; yields its folder or hub id.

    Args:
        kind: Of model, for messages.
        pretrained: Folder, hub id or shipped name, as the user gave it.
        wanted: What would do, with an example, for messages.

    Raises:
        ConfigurationError: Something is missing; the message says what and what to give instead.
    """
    try:
        with quiet():
            yield resolve(pretrained)
    except ConfigurationError:
        raise
    except (OSError, ImportError, KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigurationError(
            f"no {kind} could be read from {pretrained!r}: {reason}; give the folder or hub id of {wanted}"
        ) from error


def load(kind: Any, source: Path | str, config: Any = None) -> Any:
    """A model of one of transformers' classes, without missing weights.

    Args:
        kind: The class, or auto class.
        source: Folder or hub id.
        config: Its configuration; by default the one beside the weights.

    Raises:
        OSError, ImportError, ValueError: There is none, or some of its weights are missing.
    """
    model, report = kind.from_pretrained(source, config=config, weights_only=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, lists of weights left out on purpose, or advice on how else to read the same files."""
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
