"""The verbs that train: LightningCLI with this package's classes, defaults, run folders and messages."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers as loggers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

import lightning_draft.advantages  # noqa: F401 (its classes are known by their short names)
import lightning_draft.losses  # noqa: F401
import lightning_draft.objectives  # noqa: F401
import lightning_draft.rewards  # noqa: F401
import lightning_draft.samplers  # noqa: F401
import lightning_draft.truncation  # noqa: F401
from lightning_draft.assets import resolve
from lightning_draft.callbacks import (
    AdapterEMA,
    CostMonitor,
    GradientNormMonitor,
    LoRAExport,
    OverOptimisationGuard,
    ProgressBar,
    RewardConflict,
    SampleLogger,
)
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.callbacks.lora_export import describe
from lightning_draft.cli import runs
from lightning_draft.cli.diagnosis import diagnose
from lightning_draft.cli.failures import INTERRUPTED, complain, mendable, unwrapped
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule, RewardModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule  # noqa: F401
from lightning_draft.models import StableDiffusion, StableDiffusion3  # noqa: F401

TRAINER_DEFAULTS = {
    "max_steps": 1000,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 100,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
CALLBACKS: dict[str, tuple[type[Callback], bool, str]] = {
    "cost": (CostMonitor, True, "Reward queries, network passes and seconds so far; null for none."),
    "samples": (SampleLogger, True, "Grids of pictures, base beside tuned; null for none."),
    "export": (LoRAExport, True, "LoRA files, last and best; null for none."),
    "gradients": (GradientNormMonitor, True, "Gradient norms and what to do when they explode; null for none."),
    "checkpoint": (LastCheckpoint, True, "The checkpoint to resume from; null for none."),
    "progress": (ProgressBar, True, "The progress bar; null for Lightning's."),
    "ema": (AdapterEMA, False, "Moving average of the adapters; none by default."),
    "guard": (OverOptimisationGuard, False, "What to do when held-out rewards fall; none by default."),
    "conflict": (RewardConflict, False, "Cosine between the gradients of rewards; none by default."),
}
_OLD_NEWS = ("\N{ELECTRIC LIGHT BULB}", "TPU available", "Seed set", "`weights_only` was not set")
_SAVING = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_WRITERS = (SampleLogger, LoRAExport, LastCheckpoint, OverOptimisationGuard)
_KEYWORDS = ("hpc", "registry")


def run(verb: str, args: Sequence[str]) -> int:
    """Run `fit` or `validate` and return the exit status.

    Args:
        verb: Which.
        args: What follows it on the command line; configs are files.

    Raises:
        ConfigurationError: Something that a person can mend.
    """
    _quieten()
    import_from_here()
    options = ["--help" if arg == "--help_all" else arg for arg in args]
    with _argv([verb, *options]), mendable():
        return DraftCLI().status


class SaveRunConfig(SaveConfigCallback):
    """Write `config.yaml` into the run's folder, without the checkpoint that this run may have resumed from."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config.clone(), overwrite=True, **kwargs)
        self.config["ckpt_path"] = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it when training is set up."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class DraftCLI(LightningCLI):
    """`fit` and `validate`: parses the process's arguments, builds what they describe, and runs it.

    Attributes:
        status: The exit status of what was run.
        folder: The run's folder.
    """

    status = 0
    folder: Path

    def __init__(self) -> None:
        super().__init__(
            RewardModule,
            PromptDataModule,
            save_config_callback=SaveRunConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-draft",
                "parser_mode": "omegaconf",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are verbs here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and the callbacks that every run has."""
        parser.set_defaults({"model": {"class_path": _path(DraftModule)}})
        parser.add_argument("--name", type=str | None, default=None, help="The run writes to runs/NAME.")
        for key, (kind, used, text) in CALLBACKS.items():
            default = {"class_path": _path(kind)} if used else None
            parser.add_argument(f"--{key}", type=kind | None, default=default, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say what is wrong in one message."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OmegaConfBaseException) as error:
            raise ConfigurationError(diagnosis(sys.argv[2:]) or str(error)) from error

    def _parse_ckpt_path(self) -> None:
        """A checkpoint never overrides what was typed."""

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder and checkpoint before anything is loaded."""
        config = self.config[self.subcommand]
        configs = [Path(str(path)) for path in config.get("config") or []]
        config["name"] = config["name"] or runs.default_name(configs)
        root = Path(config["trainer"]["default_root_dir"] or runs.ROOT)
        if config["trainer"]["val_check_interval"] == 0:
            raise ConfigurationError(
                "trainer.val_check_interval=0: for no validation write trainer.limit_val_batches=0"
            )
        asked = config["ckpt_path"]
        if asked == "last":
            saved = [path.parent for path in configs if path.name == "config.yaml"]
            folders = saved[-1:] or runs.existing(root, config["name"]) or [root / config["name"]]
            elsewhere = _dirpath(config["checkpoint"])
            file = runs.last_checkpoint(folders if elsewhere is None else [elsewhere])
            config["ckpt_path"] = str(file)
            inside = [folder for folder in folders if folder in file.parents]
            self.folder = inside[0] if inside else folders[-1]
            return
        if asked and not str(asked).startswith(_KEYWORDS) and "://" not in str(asked):
            config["ckpt_path"] = str(runs.checkpoint(Path(asked)))
        self.folder = runs.fresh(root, config["name"])

    def instantiate_classes(self) -> None:
        """Build everything; the errors of constructors come through as they are."""
        with unwrapped():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run's folder, logger and callbacks to what the config says."""
        config = self._get(self.config_init, "trainer")
        if config["logger"] in (None, True):
            fit = self.subcommand == "fit"
            place = loggers.TensorBoardLogger(self.folder.parent, name=self.folder.name, version="")
            kwargs["logger"] = place if fit else False
        if self.subcommand == "validate" and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        kwargs["default_root_dir"] = str(self.folder)
        kwargs["callbacks"] = self._callbacks({**config, **kwargs})
        if not any(isinstance(callback, Checkpoint) for callback in kwargs["callbacks"]):
            kwargs["enable_checkpointing"] = False
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Say what is about to happen."""
        place = Path(self.trainer.log_dir or self.folder)
        if self.trainer.is_global_zero:
            print(_headline(self.model), flush=True)
            if not self._get(self.config, "trainer")["fast_dev_run"]:
                curves = any(isinstance(logger, loggers.TensorBoardLogger) for logger in self.trainer.loggers)
                hint = f"    (curves: tensorboard --logdir {place.parent})" if curves else ""
                print(f"run folder: {place}{hint}", flush=True)

    def fit(self, **kwargs: Any) -> None:
        """Train; Ctrl-C or SIGTERM ends it with what it has."""
        try:
            self.trainer.fit(**kwargs)
        except SystemExit as end:
            if not self.trainer.interrupted:
                raise
            self.status = INTERRUPTED
            way = "SIGTERM" if isinstance(end, SIGTERMException) else "Ctrl-C"
            complain(f"stopped by {way} after {self.trainer.global_step} steps")
        except Exception:
            if self.trainer.global_step == 0 and self.trainer.is_global_zero:
                runs.discard(self.folder)
            raise

    def after_fit(self) -> None:
        """Say what is there now, and how to use it."""
        folder = Path(self.trainer.log_dir or self.folder)
        if self.trainer.is_global_zero:
            print("\n".join(self._farewell(folder)), flush=True)

    def validate(self, **kwargs: Any) -> None:
        """Score held-out prompts and print the means."""
        (scores,) = self.trainer.validate(verbose=False, **{k: v for k, v in kwargs.items() if k != "verbose"})
        if self.trainer.is_global_zero:
            width = max(map(len, scores))
            print("\n".join(f"{name:{width}}  {value:.6g}" for name, value in sorted(scores.items())))

    def _callbacks(self, config: Any) -> list[Callback]:
        """The config's own, and those of `CALLBACKS` that are not switched off."""
        given = config["callbacks"] or []
        callbacks = list(given) if isinstance(given, Sequence) else [given]
        named = [self._get(self.config_init, key) for key in CALLBACKS]
        if config["enable_progress_bar"] is False or any(isinstance(c, AnyProgressBar) for c in callbacks):
            named = [callback for callback in named if not isinstance(callback, AnyProgressBar)]
        if config["enable_checkpointing"] is False:
            named = [callback for callback in named if not isinstance(callback, Checkpoint)]
        if config["fast_dev_run"]:
            named = [callback for callback in named if not isinstance(callback, _WRITERS)]
        return callbacks + [callback for callback in named if callback is not None]

    def _farewell(self, folder: Path) -> Iterator[str]:
        if self.status == INTERRUPTED and (folder / "checkpoints" / "last.ckpt").exists():
            yield f"resume:   add --ckpt_path last --name {self.config[self.subcommand]['name']}"
        exports = [callback for callback in self.trainer.callbacks if isinstance(callback, LoRAExport)]  # type: ignore[attr-defined]
        files = [file for export in exports for file in (export.best_path, export.last_path) if file.is_file()]
        if not files or self._get(self.config, "trainer")["fast_dev_run"]:
            return
        guards = [callback for callback in self.trainer.callbacks if isinstance(callback, OverOptimisationGuard)]  # type: ignore[attr-defined]
        files = [guard.best_path for guard in guards if guard.best_path.is_file()] + files
        base = getattr(self.model.model, "pretrained", "...")
        family = getattr(self.model.model, "family", None)
        opener = "DiffusionPipeline" if family is None else family.pipeline_class.__name__
        yield f"adapters: {'  '.join(map(str, files))}"
        yield f"pictures: lightning-draft sample {folder}"
        yield "in diffusers:"
        yield f'    pipe = {opener}.from_pretrained("{resolve(base)}")'
        yield f'    pipe.load_lora_weights("{files[0]}")'


def import_from_here() -> None:
    """Let classes of the user's be imported from the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def diagnosis(args: list[str]) -> str | None:
    """What is wrong with the arguments of a verb; what a module of the user's raises is raised."""
    named = {key: kind | None for key, (kind, _, _) in CALLBACKS.items()}
    groups = {"model": RewardModule, "data": PromptDataModule, "trainer": Trainer}
    plain = {"seed_everything": bool | int, "name": str | None, "ckpt_path": str | None}
    rest = {"weights_only": bool | None, "verbose": bool}
    classes = {"model": DraftModule, "data": PromptDataModule, "trainer": Trainer}
    defaults = {**classes, **{key: kind for key, (kind, _, _) in CALLBACKS.items()}}
    try:
        return diagnose(args, {**groups, **plain, **rest, **named}, {key: _path(c) for key, c in defaults.items()})
    except ConfigurationError:
        raise
    except Exception as bug:
        raise bug from None


def _headline(module: RewardModule) -> str:
    count = sum(parameter.numel() for parameter in module.trainable_parameters().values())
    parts = [module.reward, module.method, getattr(module, "advantage_estimator", None), module.sampler]
    said = ", ".join(describe(part) for part in parts if part is not None)
    return f"{type(module).__name__}: {said}; {count:,} trainable parameters"


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _dirpath(callback: Any) -> Path | None:
    """The folder that a callback's config gives, if it gives one."""
    folder = None if callback is None else callback.get("init_args", {}).get("dirpath")
    return None if folder is None else Path(folder)


@contextmanager
def _argv(args: list[str]) -> Iterator[None]:
    """Within this context the process's arguments are `args`, by which distributed strategies start more processes."""
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def _quieten() -> None:
    """Keep notices that nobody can act on off the screen."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", _SAVING):
        logging.getLogger(name).addFilter(_is_news)
    for text in (".*treespec.*", ".*does not have many workers.*", ".*in eval mode at the start.*"):
        warnings.filterwarnings("ignore", text)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_OLD_NEWS)
