"""The configuration of a run, written into its folder and compared when the run is resumed."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_draft import __version__
from lightning_draft.cli.messages import flatten, print_warning
from lightning_draft.cli.run_folder import locked
from lightning_draft.cli.tensorboard import describe_run
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path, remove_partial_files
from lightning_draft.methods.base import RewardModule
from lightning_draft.redaction import redact

_NOT_COMPARED = ("name", "resume", "ckpt_path", "weights_only")
_FREE = (  # options that do not affect the result of the remaining steps
    "trainer.max_",
    "trainer.min_",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.profiler",
    "trainer.callbacks",
    "trainer.detect_anomaly",
    "progress",
    "samples",
    "export",
    "checkpoint",
    "cost",
    "conflict",
    "data.num_workers",
    "model.model.text.cache",
    "seed_everything",  # a resumed run keeps the seeds that follow it
)
_FIXED = (
    "model.class_path",
    "model.model.class_path",
    "model.model.pretrained",
    "model.model.pretrained_config",
    "model.model.lora",
    "model.model.trainable",
    "model.optimizer.class_path",
    "model.lr_scheduler",
)
_OPTIMIZER = "model.optimizer."


class RunRecord(Callback):
    """Write `config.yaml` when training starts, and the changes of a resumed run to `config-resume-N.yaml`.

    `config.yaml` is never replaced. The configuration is part of every checkpoint, so that a resumed run can be
    compared with the run that wrote the checkpoint. Changes of the model, its adapters, the class of the optimizer or
    the learning-rate schedule are errors; changed options of the optimizer are applied; other changes take effect and
    are printed. A change of something that training depends on, such as the reward or the batch size, also gives a
    warning, because the resumed run then differs from an uninterrupted one.

    If the folder is moved or removed during training, it is created again, with a warning.

    Args:
        config: The configuration of this run; secrets are removed.
        folder: The run's folder.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self.config = redact({**config, "ckpt_path": None, "resume": None})
        self.folder = folder
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._lock = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration as YAML text."""
        return {"config": _dump(self.config)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the configuration of the run that wrote the checkpoint.

        Raises:
            ConfigurationError: An option was changed that must stay the same in a resumed run.
        """
        self.changes = changed_options(yaml.safe_load(state_dict["config"]), self.config)
        check_changes(self.changes, self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply changed options of the optimizer; write the configuration."""
        options = {key.removeprefix(_OPTIMIZER): new for key, (_, new) in self.changes.items() if _OPTIMIZER in key}
        for optimizer in trainer.optimizers if options else ():
            for group in optimizer.param_groups:
                group.update({name: value for name, value in options.items() if name in group})
        if trainer.is_global_zero:
            for key, (old, new) in self.changes.items():
                print(f"changed since the checkpoint: --{key} {old!r} -> {new!r}", flush=True)
            if decisive := decisive_changes(self.changes):
                print_warning(
                    f"this run differs from an uninterrupted one, because training depends on --{', --'.join(decisive)}"
                )
            self._write()
            evaluated = pl_module.eval_reward_names if isinstance(pl_module, RewardModule) else []
            describe_run(trainer.loggers, _dump(self.config), ["reward", *evaluated])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Create the folder again if it is gone, before the loggers write to it."""
        self._restore(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folder again if it is gone, before the loggers write to it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folder again if it is gone."""
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Create the folder again if it is gone and training has begun."""
        if trainer.global_step > 0:
            self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock of a folder that was created again."""
        self._lock.close()

    def _restore(self, trainer: Trainer) -> None:
        """Create the folder with its configuration, and the folders and files of the loggers, if it is gone."""
        first = self.folder / "config.yaml"
        if not trainer.is_global_zero or first.exists():
            return
        print_warning(
            f"{self.folder} was moved or removed during training; it was created again at step {trainer.global_step}, "
            "and the checkpoint and the LoRA files of later steps are written to it. Its earlier files are where it "
            "was moved"
        )
        _write_text(first, self._text())
        self._lock.close()
        self._lock.enter_context(locked(self.folder))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with suppress(OSError):  # values that could not be written
                    logger.experiment.close()
                logger._experiment = None  # its next value opens a new file
            elif isinstance(logger, CSVLogger):
                Path(logger.log_dir).mkdir(parents=True, exist_ok=True)

    def _text(self) -> str:
        return f"# lightning-draft {__version__}\n{_dump(self.config)}"

    def _write(self) -> None:
        """Write the configuration, unless the folder has the same one."""
        remove_partial_files(self.folder)
        first = self.folder / "config.yaml"
        if not first.exists():
            _write_text(first, self._text())
        elif self.changes:
            number = 1 + len(list(self.folder.glob("config-resume-*.yaml")))
            lines = "".join(f"# --{key}: {old!r} -> {new!r}\n" for key, (old, new) in self.changes.items())
            _write_text(self.folder / f"config-resume-{number}.yaml", lines + _dump(self.config))


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the old and new value of each option that differs, by its full name.

    An option that the old configuration lacks, as one written by an older release may, counts as equal if it is now
    off.
    """
    before, after = flatten(old), flatten(new)
    before |= {key: value for key, value in after.items() if key not in before and (value is None or value is False)}
    names = [key for key in dict.fromkeys([*before, *after]) if key.partition(".")[0] not in _NOT_COMPARED]
    return {
        key: (before.get(key), after.get(key)) for key in names if _comparable(before, key) != _comparable(after, key)
    }


def decisive_changes(changes: Iterable[str]) -> list[str]:
    """Return the options that affect training, so that a resumed run differs from an uninterrupted one."""
    return [key for key in changes if not key.startswith(_FREE)]


def check_changes(changes: Mapping[str, tuple[Any, Any]], config: Mapping[str, Any]) -> None:
    """Check that a resumed run can have these changes.

    Raises:
        ConfigurationError: A change is not possible; the message names the option and both values.
    """
    for key, (old, new) in changes.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigurationError(
                f"--{key}: the checkpoint was trained with {old!r} and this run has {new!r}; a resumed run must keep "
                f"it. Write --{key} {old}, or start a new run without --ckpt_path"
            )
    if f"{_OPTIMIZER}lr" in changes and flatten(config).get("model.lr_scheduler.class_path"):
        old, new = changes[f"{_OPTIMIZER}lr"]
        raise ConfigurationError(
            f"--{_OPTIMIZER}lr: changed from {old!r} to {new!r}, but the learning rate of this run is set by its "
            f"lr_scheduler, whose state is in the checkpoint; write --{_OPTIMIZER}lr {old}, or start a new run"
        )


def without_enums(options: Any) -> Any:
    """Return options with the values of enumerations in place of their members, which YAML cannot represent."""
    if isinstance(options, Namespace):
        return Namespace({key: without_enums(value) for key, value in vars(options).items()})  # type: ignore[no-untyped-call]
    if isinstance(options, dict):
        return {key: without_enums(value) for key, value in options.items()}
    if isinstance(options, list):
        return [without_enums(value) for value in options]
    return options.value if isinstance(options, Enum) else options


def _comparable(options: Mapping[str, Any], key: str) -> Any:
    value = options.get(key)
    return list(value) if isinstance(value, tuple) else value


def _dump(config: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
