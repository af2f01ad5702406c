"""Load models of transformers; missing weights are an error, and code from repositories is never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_draft.assets import resolve
from lightning_draft.errors import ConfigurationError
from lightning_draft.weightless import is_without_weights, shapes_only


@contextmanager
def reading(kind: str, pretrained: str, wanted: str) -> Iterator[Path | str]:
    """Convert errors of reading a model within this context into one message; yield its folder or hub id.

    Args:
        kind: Kind of model, for messages.
        pretrained: Folder, hub id or shipped name, as the user gave it.
        wanted: What can be given instead, with an example, for messages.

    Raises:
        ConfigurationError: The model cannot be read; the message gives the reason and what to write instead.
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
    """Load a model of one of transformers' classes; missing weights are an error.

    Args:
        kind: The class, or auto class.
        source: Folder or hub id.
        config: Its configuration; by default the one beside the weights.

    Raises:
        OSError, ImportError, ValueError: There is no model, or some of its weights are missing.
    """
    if is_without_weights():
        return _skeleton(kind, source, config)
    model, report = kind.from_pretrained(source, config=config, weights_only=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def _skeleton(kind: Any, source: Path | str, config: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source) if config is None else config
    with shapes_only():
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and notices of transformers within this context."""
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
