"""`fit` and `validate`: LightningCLI with this package's classes, defaults, run folders and messages."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from lightning_draft.cli import messages, run_folder, shipped, summary
from lightning_draft.cli.callback_options import CALLBACK_OPTIONS
from lightning_draft.cli.config_text import check_names
from lightning_draft.cli.null_values import restore_nulls
from lightning_draft.cli.option_checks import check_callbacks, check_groups, check_options
from lightning_draft.cli.options import FILE_WRITERS, TRAINER_DEFAULTS, add_run_options, explain_parser_error
from lightning_draft.cli.parser_problem import distinct_causes
from lightning_draft.cli.preemption import Preemption, requeue
from lightning_draft.cli.process import (
    full_option_names,
    is_first_process,
    option_values,
    overridden_variables,
    process_arguments,
)
from lightning_draft.cli.run_folder import RunFolder
from lightning_draft.cli.run_record import RunRecord, without_enums
from lightning_draft.cli.run_seeds import HELP, saved_options, set_seeds
from lightning_draft.cli.run_trainer import RunTrainer, StepNumber, place_loggers
from lightning_draft.cli.tensorboard import RunLogger
from lightning_draft.cli.text_embedding import embed_prompts
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.methods.base import RewardModule


def run(command: Literal["fit", "validate"], args: Sequence[str]) -> int:
    """Run `fit` or `validate` and return the exit status.

    Args:
        command: `fit` or `validate`.
        args: The arguments after the command, with configs as files.

    Raises:
        ConfigurationError: The configuration is not valid.
    """
    options = ["--help" if arg == "--help_all" else arg for arg in args]
    with process_arguments([command, *options]), full_option_names(options):
        return DraftCLI(command).status


class DraftCLI(LightningCLI):
    """Parse the process's arguments, build the objects, and run the command.

    Args:
        command: `fit` or `validate`.

    Attributes:
        status: The exit status.
        run: The run's folder and the checkpoint that it continues from.
    """

    status = 0
    run: RunFolder | None = None

    def __init__(self, command: Literal["fit", "validate"]) -> None:
        self.command = command
        self.preemption = Preemption()
        self._as_written: Any = Namespace()  # type: ignore[no-untyped-call]
        try:
            with messages.as_configuration_error():
                super().__init__(
                    RewardModule,
                    PromptDataModule,
                    save_config_callback=None,
                    trainer_class=RunTrainer,
                    trainer_defaults=TRAINER_DEFAULTS,
                    parser_kwargs={
                        "prog": "lightning-draft",
                        "parser_mode": "omegaconf",
                        "exit_on_error": False,
                        "allow_abbrev": False,
                        "default_env": any(name.startswith(f"PL_{command.upper()}__") for name in os.environ),
                    },
                    subclass_mode_model=True,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
        except ConfigurationError as error:
            named = messages.with_option_name(str(error), messages.flatten(self._as_written.as_dict()))
            raise type(error)(named) from error
        finally:
            self._discard_unused_folder()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the Trainer's method, and which of its arguments are not options."""
        options = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule", "verbose"},
        }
        return {self.command: options[self.command]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed of the run."""
        parser.add_argument("--seed_everything", type=bool | int, default=0, help=HELP)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name, how it resumes, and one option for each callback."""
        add_run_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; report an error in one message."""
        try:
            super().parse_arguments(parser, args)
            restore_nulls(self.config[self.command], sys.argv)
        except OmegaConfBaseException as error:
            configs = ", ".join(option_values(sys.argv, "--config"))
            raise ConfigurationError(
                f"{configs}: {str(error).splitlines()[0]}; write ${{KEY}} for another key of the file, or "
                "${oc.env:NAME,DEFAULT} for an environment variable"
            ) from error
        except (argparse.ArgumentError, TypeError) as error:
            self._raise_yaml_error(error)
            for path in option_values(sys.argv, "--config"):
                check_names(path)
            message = explain_parser_error(error)
            if message.startswith("--model") and "is missing" in message and not option_values(sys.argv, "--config"):
                message = "there is no config; start from one, such as --config quickstart"
            raise ConfigurationError(message) from error

    def _raise_yaml_error(self, error: BaseException) -> None:
        """Raise if omegaconf found a duplicate key, a cycle or too many nodes in a config."""
        reason = next((link for link in distinct_causes(error) if isinstance(link, yaml.MarkedYAMLError)), None)
        if reason is not None:
            raise shipped.yaml_error(", ".join(option_values(sys.argv, "--config")), reason) from error

    def _parse_ckpt_path(self) -> None:
        """Do nothing, so that options saved in a checkpoint never override the given ones."""

    def _set_seed(self) -> None:
        """Do nothing: `before_instantiate_classes` sets the seeds, because a resumed run keeps its own."""

    def before_instantiate_classes(self) -> None:
        """Check values, and choose the run's folder and checkpoint before anything is loaded."""
        config = self.config[self.command]
        configs = [Path(str(path)) for path in config.get("config") or []]
        config["name"] = config["name"] or run_folder.default_name(configs)
        self._as_written = config.clone()  # for messages
        written = messages.flatten(config.as_dict())
        check_options(written)
        if is_first_process():
            for message in overridden_variables(self.command, written):
                messages.print_warning(message)
        check_groups(config["model"], "model")
        root = Path(config["trainer"]["default_root_dir"] or run_folder.ROOT).expanduser()
        writes = self.command == "fit" and not config["trainer"]["fast_dev_run"] and is_first_process()
        self.run = run_folder.choose(
            config, root, configs, named=bool(option_values(sys.argv, "--name")), creates=writes
        )
        set_seeds(config, saved_options(self.run.checkpoint))
        self._as_written = config.clone()
        config["ckpt_path"] = None if self.run.checkpoint is None else str(self.run.checkpoint)
        place_loggers(config["trainer"]["logger"], self.run.path, root)
        embed_prompts(config)

    def instantiate_classes(self) -> None:
        """Build all objects; an error of a constructor is raised without the parser's exceptions around it."""
        with messages.as_root_cause():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run's folder, logger and callbacks to the Trainer's options."""
        assert self.run is not None
        config = self._get(self.config_init, "trainer")
        if config["logger"] in (None, True):
            kwargs["logger"] = RunLogger(self.run.path) if self.command == "fit" else False
        if self.command == "validate" and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        kwargs["default_root_dir"] = str(self.run.path)
        kwargs["callbacks"] = self._callbacks({**config, **kwargs})
        if not any(isinstance(callback, Checkpoint) for callback in kwargs["callbacks"]):
            kwargs["enable_checkpointing"] = False
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, config: Any) -> list[Callback]:
        """Return the callbacks of `trainer.callbacks`, the enabled `CALLBACK_OPTIONS`, and the command line's own."""
        assert self.run is not None
        given = config["callbacks"] or []
        chosen = list(given) if isinstance(given, Sequence) else [given]
        check_callbacks(chosen, self.model)
        named = [self._get(self.config_init, option.key) for option in CALLBACK_OPTIONS]
        if config["enable_progress_bar"] is False or any(isinstance(c, AnyProgressBar) for c in chosen):
            named = [callback for callback in named if not isinstance(callback, AnyProgressBar)]
        if config["enable_checkpointing"] is False:
            named = [callback for callback in named if not isinstance(callback, Checkpoint)]
        if config["fast_dev_run"]:
            named = [callback for callback in named if not isinstance(callback, FILE_WRITERS)]
        elif self.command == "fit":
            with warnings.catch_warnings():  # newer releases of jsonargparse rename the argument
                warnings.simplefilter("ignore", DeprecationWarning)
                written = without_enums(self._as_written)
                record = yaml.safe_load(self._parser("fit").dump(written, skip_none=False))
            named = [*named, RunRecord(record, self.run.path), StepNumber(), self.preemption]
        return chosen + [callback for callback in named if callback is not None]

    def before_fit(self) -> None:
        """Print the method, the run's folder, and the checkpoint that the run continues from."""
        assert self.run is not None
        if self.trainer.is_global_zero:
            print(messages.printable(summary.headline(self.model)), flush=True)
            if not self._get(self.config, "trainer")["fast_dev_run"]:
                print(summary.folder_line(self.trainer, self.run.path), flush=True)
            if self.run.checkpoint is not None:
                print(f"continuing from {self.run.checkpoint}", flush=True)

    def fit(self, **kwargs: Any) -> None:
        """Train; after Ctrl-C, SIGTERM or the scheduler's SIGUSR1, training ends with a checkpoint."""
        try:
            with self.preemption.handle_signal():
                self.trainer.fit(**kwargs)
        except DivergenceError as error:
            self.status = messages.FAILED
            if self.trainer.is_global_zero:
                messages.print_error(f"training failed: {error}")
        except SystemExit as end:
            if not self.trainer.interrupted:
                raise
            self.status = messages.TERMINATED if isinstance(end, SIGTERMException) else messages.INTERRUPTED
            self._report_interruption()
        else:
            self._check_trained()

    def _check_trained(self) -> None:
        """Raise if training ended without a step and without an error."""
        if self.trainer.global_step == 0:
            config = self._get(self.config, "trainer")
            raise ConfigurationError(
                f"training ended without a step: --trainer.limit_train_batches={config['limit_train_batches']!r}, "
                f"--trainer.max_time={config['max_time']!r}; write larger values, or null for all batches and no limit"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; process 0 locks the run's folder for training."""
        writes = subcommand == "fit" and self.trainer.is_global_zero and self.run is not None and self.run.path.is_dir()
        with run_folder.locked(self.run.path) if writes and self.run is not None else nullcontext():
            super()._run_subcommand(subcommand)

    def _report_interruption(self) -> None:
        if not self.trainer.is_global_zero:
            return
        signals = {messages.INTERRUPTED: "Ctrl-C", messages.TERMINATED: "SIGTERM"}
        signal_name = "SIGUSR1" if self.preemption.requested else signals[self.status]
        messages.print_error(f"stopped by {signal_name} after {self.trainer.global_step} steps")
        if self.preemption.requested and requeue():
            print("the job was requeued", flush=True)

    def after_fit(self) -> None:
        """Print the written files and how to use them."""
        assert self.run is not None
        if not self.trainer.is_global_zero or self.trainer.global_step == 0:
            return
        if self.status and (self.run.path / "checkpoints" / "last.ckpt").exists():
            print(f"resume:     lightning-draft fit --config {self.run.path} --ckpt_path last")
        if not self._get(self.config, "trainer")["fast_dev_run"]:
            print("\n".join(summary.closing_lines(self.trainer, self.model, self.run.path)), flush=True)
        if any(callback.upload_failed for callback in summary.exports(self.trainer)):
            self.status = self.status or messages.FAILED

    def validate(self, **kwargs: Any) -> None:
        """Validate on the held-out prompts and print the mean scores."""
        if self.trainer.is_global_zero and kwargs.get("ckpt_path") is None:
            print("no --ckpt_path: these are the scores of the base model", flush=True)
        (scores,) = self.trainer.validate(verbose=False, **kwargs)
        if self.trainer.is_global_zero:
            width = max(map(len, scores))
            print("\n".join(f"{name:{width}}  {value:.6g}" for name, value in sorted(scores.items())))

    def _discard_unused_folder(self) -> None:
        """Remove the folder of a run that failed or was interrupted before its first step."""
        trainer = getattr(self, "trainer", None)
        if self.run is not None and (trainer is None or trainer.global_step == 0):
            run_folder.discard(self.run)
