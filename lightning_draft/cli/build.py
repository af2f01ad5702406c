"""Build the method and the data of a configuration without running it."""

from typing import Any

from lightning.pytorch import Trainer

from lightning_draft.cli import messages
from lightning_draft.cli.app import DraftCLI
from lightning_draft.cli.option_checks import check_options
from lightning_draft.cli.run_seeds import set_seeds


class BuildCLI(DraftCLI):
    """Parse the options of `fit` and build the method and the data, without a run folder, loggers or callbacks."""

    def before_instantiate_classes(self) -> None:
        """Check values, and set the seeds."""
        config = self.config[self.command]
        self._as_written = config.clone()
        check_options(messages.flatten(config.as_dict()))
        set_seeds(config, {})
        config["trainer"]["logger"] = False
        config["trainer"]["callbacks"] = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a Trainer that is not used."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""
