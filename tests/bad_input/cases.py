"""One row of the table of invalid input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Content = str | bytes | Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """Invalid input, and what its message must say.

    Args:
        kind: The heading in `docs/errors.md`.
        shown: The input as a user writes it.
        says: Texts that the message must have: the option or file, the value, the reason and a value that works.
        args: Arguments of `lightning-draft`; `None` for a call from Python.
        call: What is called, in the folder of the case; `None` for the command line.
        files: Files that are written before: text, bytes, or a function of the path.
        edit: Replacements in the config `small.yaml`.
        config: Content of the config that `args` name as `small.yaml`.
        status: The exit status.
        writes: Whether it is noticed after training has begun, so that the run's folder stays.
    """

    kind: str
    shown: str
    says: tuple[str, ...]
    args: tuple[str, ...] | None = None
    call: Callable[[Path], Any] | None = None
    files: Mapping[str, Content] = field(default_factory=dict)
    edit: tuple[str, str] | None = None
    config: str = ""
    status: int = 2
    writes: bool = False


PARSED = """\
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: StableDiffusion
      init_args: {pretrained: emoji64, guidance: {scale: 2.0}, lora: {rank: 2}}
    sampler:
      class_path: DDIM
      init_args: {num_steps: 3}
    truncation:
      class_path: LastK
      init_args: {k: 2}
    reward:
      class_path: Brightness
      init_args: {target: 0.9}
data:
  prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]
  val_size: 2
  batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  val_check_interval: 2
"""
"""A config that is read and not run."""

BUILT = """\
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: lightning_draft.testing.LinearModel
    sampler:
      class_path: DDIM
      init_args: {num_steps: 3}
    truncation:
      class_path: LastK
      init_args: {k: 2}
    reward:
      class_path: lightning_draft.testing.LinearReward
data:
  prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]
  val_size: 2
  batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  val_check_interval: 2
  enable_progress_bar: false
samples: null
export: null
gradients: null
cost: null
"""
"""A config of a run of milliseconds, on a linear model."""


def parsed(kind: str, options: str | list[str], *says: str, **more: Any) -> Case:
    """Return a case of `fit` whose options cannot be read; nothing is built."""
    return _fit(kind, options, PARSED, says, **more)


def built(kind: str, options: str | list[str], *says: str, **more: Any) -> Case:
    """Return a case of `fit` whose options can be read, and do not work."""
    return _fit(kind, options, BUILT, says, **more)


def edited(kind: str, old: str, new: str, *says: str, **more: Any) -> Case:
    """Return a case of `fit` with a text of its config replaced."""
    return Case(kind, new.strip(), says, ("fit", "--config", "small.yaml"), edit=(old, new), config=PARSED, **more)


def command(kind: str, args: str | list[str], *says: str, **more: Any) -> Case:
    """Return a case of a whole command line."""
    parts = args.split() if isinstance(args, str) else args
    return Case(kind, _joined(parts), says, tuple(parts), **more)


def python(kind: str, shown: str, call: Callable[[Path], Any], *says: str, **more: Any) -> Case:
    """Return a case of a call from Python, which must raise `ConfigurationError`."""
    return Case(kind, shown, says, call=call, **more)


def _fit(kind: str, options: str | list[str], config: str, says: tuple[str, ...], **more: Any) -> Case:
    parts = options.split() if isinstance(options, str) else options
    return Case(kind, _joined(parts), says, ("fit", "--config", "small.yaml", *parts), config=config, **more)


def _joined(parts: list[str]) -> str:
    shown = " ".join(part if part and not any(c in part for c in " {[") else f"'{part}'" for part in parts)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
