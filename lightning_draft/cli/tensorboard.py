"""What a run shows in TensorBoard besides scalars and images: combined charts, and the configuration."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Write event files into the run's folder, without the scalar `epoch` that Lightning adds to all values.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent, name=folder.name, version="")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def charts(rewards: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the page "Custom Scalars": each reward in one chart, of both models.

    Args:
        rewards: Names of the rewards: `reward`, and those of the evaluation rewards.
    """
    names = list(rewards)
    return {
        "rewards": {
            "validation": ["Multiline", [f"^val/{name}$" for name in names]],
            **{name: ["Multiline", [f"^samples/{name}$", f"^samples/{name}_base$"]] for name in names},
        },
        "training": {
            "reward": ["Multiline", ["^train/reward$"]],
            "gradient norm": ["Multiline", ["^train/gradient_norm/total$"]],
        },
    }


def describe_run(loggers: Iterable[Logger], config: str, rewards: Iterable[str]) -> None:
    """Write the charts and the configuration to each TensorBoard logger.

    Args:
        loggers: The loggers of the run; others are ignored.
        config: The configuration as YAML.
        rewards: As for `charts`.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(charts(rewards))
            logger.experiment.add_text("config", f"```yaml\n{config}```")
