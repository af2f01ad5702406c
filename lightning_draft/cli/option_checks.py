"""Check options whose invalid values the Trainer and torch accept silently or report unclearly."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning

from lightning_draft.callbacks.ema import check_averaging
from lightning_draft.cli import hints
from lightning_draft.cli.run_seeds import MAX_SEED
from lightning_draft.errors import ConfigurationError
from lightning_draft.redaction import HIDDEN

_MAX_DEVICES = 64
MAX_BATCH = 2**16
_DEVICES = r"auto|-1|[1-9]\d*|\d+(,\d+)+|\d+,"


@dataclass(frozen=True)
class OptionCheck:
    """A condition on the value of one option; `null` is always valid.

    Args:
        name: The option's full name.
        is_valid: The condition.
        rule: The condition in words.
        hint: What to write instead.
    """

    name: str
    is_valid: Callable[[Any], bool]
    rule: str
    hint: str


def _is_available(accelerator: Any) -> bool:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(str(accelerator), True)


CHECKS = (
    OptionCheck(
        "trainer.max_steps", lambda n: n == -1 or n >= 1, "must be at least 1, or -1 for no limit", "write 200"
    ),
    OptionCheck(
        "trainer.max_epochs", lambda n: n == -1 or n >= 1, "must be at least 1, or -1 for no limit", "write 10"
    ),
    OptionCheck("trainer.accumulate_grad_batches", lambda n: n >= 1, "must be at least 1", "write 1"),
    OptionCheck(
        "trainer.gradient_clip_val",
        lambda x: 0 < x < math.inf,
        "must be a positive number",
        "write 1.0, or null for no clipping",
    ),
    OptionCheck("trainer.log_every_n_steps", lambda n: n >= 1, "must be at least 1", "write 1"),
    OptionCheck(
        "trainer.val_check_interval",
        lambda n: n != 0,
        "must not be 0",
        "for no validation write --trainer.limit_val_batches 0",
    ),
    OptionCheck(
        "trainer.strategy",
        lambda strategy: not any(start in str(strategy) for start in ("spawn", "fork", "notebook")),
        "must not start processes by spawn or fork, which cannot copy the functions that build optimizers",
        "write ddp",
    ),
    OptionCheck(
        "trainer.devices",
        lambda devices: isinstance(devices, list) or re.fullmatch(_DEVICES, str(devices)) is not None,
        "must be auto, the number of devices, or their numbers such as 0,1",
        "write 1",
    ),
    OptionCheck("trainer.accelerator", _is_available, "is not available on this machine", "write auto or cpu"),
    *(
        OptionCheck(
            f"trainer.{name}",
            lambda n: 0 <= n <= 1 or (n > 1 and n % 1 == 0),
            "must be a number of batches, or a fraction in [0.0, 1.0]",
            f"write 1 for one batch, or {default}",
        )
        for name, default in (
            ("limit_train_batches", "1.0 for all"),
            ("limit_val_batches", "1.0 for all"),
            ("overfit_batches", "0.0 for all"),
        )
    ),
    OptionCheck("trainer.fast_dev_run", lambda n: n >= 0, "must be true, false or a number of steps", "write true"),
    OptionCheck(
        "trainer.devices",
        lambda devices: not str(devices).isdecimal() or int(devices) <= _MAX_DEVICES,
        f"must be at most {_MAX_DEVICES}, since each device is a process on this machine",
        "write 1",
    ),
    OptionCheck(
        "trainer.barebones",
        lambda barebones: barebones is not True,
        "must be false, because a run logs and writes checkpoints",
        "to measure speed, write --trainer.profiler simple",
    ),
    *(
        OptionCheck(f"data.{name}", lambda n: n <= MAX_BATCH, f"must be at most {MAX_BATCH}", "write 8")
        for name in ("batch_size", "val_batch_size")
    ),
    OptionCheck("trainer.num_sanity_val_steps", lambda n: n >= -1, "must be at least 0, or -1 for all", "write 0"),
    OptionCheck("trainer.min_steps", lambda n: n >= 0, "must be at least 0", "write 1, or null"),
    OptionCheck("trainer.min_epochs", lambda n: n >= 0, "must be at least 0", "write 1, or null"),
    OptionCheck("trainer.check_val_every_n_epoch", lambda n: n >= 1, "must be at least 1", "write 1, or null"),
    OptionCheck(
        "trainer.profiler",
        lambda profiler: not isinstance(profiler, str) or profiler in ("simple", "advanced", "pytorch", "xla"),
        "must be one of simple, advanced, pytorch, xla",
        "write simple",
    ),
    OptionCheck("model.lr_scheduler.step_size", lambda n: n >= 1, "must be at least 1", "write 100"),
    OptionCheck("model.lr_scheduler.T_max", lambda n: n >= 1, "must be at least 1", "write the number of steps"),
    OptionCheck("model.lr_scheduler.T_0", lambda n: n >= 1, "must be at least 1", "write 100"),
    OptionCheck("trainer.num_nodes", lambda n: n >= 1, "must be at least 1", "write 1"),
    OptionCheck(
        "seed_everything",
        lambda n: isinstance(n, bool) or 0 <= n <= MAX_SEED,
        f"must be between 0 and {MAX_SEED}",
        "write 0",
    ),
    OptionCheck(
        "model.optimizer.lr",
        lambda x: not isinstance(x, (int, float)) or 0 < x < math.inf,
        "must be positive",
        "write 1e-4",
    ),
    OptionCheck(
        "model.optimizer.weight_decay", lambda x: 0 <= x < math.inf, "must be a number of at least 0", "write 0.01"
    ),
)


def check_options(options: Mapping[str, Any]) -> None:
    """Check the values of options.

    Args:
        options: Values by full name, such as `trainer.max_steps`.

    Raises:
        ConfigurationError: A value is not valid; the message gives a valid value.
    """
    for check in CHECKS:
        value = options.get(check.name)
        if value is not None and not check.is_valid(value):
            raise ConfigurationError(f"--{check.name}={value!r} {check.rule}; {check.hint}")
    if options.get("trainer.max_steps", 1) is None:
        raise ConfigurationError("--trainer.max_steps=null must be a number; write 200, or -1 for no limit")
    for unit in ("epochs", "steps"):
        least, most = options.get(f"trainer.min_{unit}"), options.get(f"trainer.max_{unit}")
        if least is not None and most is not None and 0 < most < least:
            raise ConfigurationError(
                f"--trainer.min_{unit}={least} must be at most --trainer.max_{unit}={most}; write --trainer.min_{unit} "
                f"{most}"
            )
    if options.get("trainer.gradient_clip_algorithm") and options.get("trainer.gradient_clip_val") is None:
        raise ConfigurationError(
            f"--trainer.gradient_clip_algorithm={options['trainer.gradient_clip_algorithm']!r} has no effect without "
            "--trainer.gradient_clip_val; write --trainer.gradient_clip_val 1.0"
        )
    for name, value in options.items():
        if isinstance(value, str) and HIDDEN in value:
            raise ConfigurationError(
                f"--{name}: this config was saved without its secrets; give the value again with --{name} VALUE"
            )


def check_callbacks(callbacks: Iterable[Callback], module: LightningModule) -> None:
    """Check that none of the callbacks needs a module of another kind.

    Raises:
        ConfigurationError: One of them cannot work with the module.
    """
    callbacks = list(callbacks)
    check_averaging(callbacks)
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelPruning):
            raise ConfigurationError(
                f"--trainer.callbacks={name} cannot be used: it replaces weights by masked ones, which checkpoints and "
                "LoRA files do not contain; leave it out, or write a smaller --model.model.lora.rank"
            )
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise ConfigurationError(
                f"--trainer.callbacks={name} cannot be used: it unfreezes the module's `backbone`, which "
                f"{type(module).__name__} does not have; leave it out, or choose the trained weights with "
                "--model.model.trainable"
            )


def check_groups(config: Any, name: str) -> None:
    """Check that no group of options, such as `old_policy`, is `null`, which the parser accepts and cannot build.

    Args:
        config: The parsed class, with `class_path` and `init_args`.
        name: The option that has it.

    Raises:
        ConfigurationError: A group is `null`.
    """
    if not isinstance(config, Namespace) or "class_path" not in config:
        return
    module, _, kind = config["class_path"].rpartition(".")
    known = hints.parameters(getattr(import_module(module), kind))
    for key, value in vars(config.get("init_args") or Namespace()).items():  # type: ignore[no-untyped-call]
        if value is None and is_dataclass(known.get(key)):
            raise ConfigurationError(
                f"--{name}.{key}: expected {hints.describe(known[key])}, got null; leave it out for its defaults, or "
                f"write --{name}.{key}.{next(iter(hints.parameters(known[key])))} VALUE"
            )
        check_groups(value, f"{name}.{key}")
