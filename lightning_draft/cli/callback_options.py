"""The callbacks that have their own option; the table is used by the command line and its help page."""

from typing import NamedTuple


class CallbackOption(NamedTuple):  # `import dataclasses` would take a fifth of the start-up time of `--version`
    """An option of the command line that configures one callback.

    Args:
        key: The option's name, without dashes.
        class_name: The callback's class in `lightning_draft.callbacks`.
        enabled: Whether a run has it by default.
        help: Short description.
        writes_files: Whether it writes files, which a run with `fast_dev_run` does not.
    """

    key: str
    class_name: str
    enabled: bool
    help: str
    writes_files: bool = False


CALLBACK_OPTIONS = (
    CallbackOption("cost", "CostMonitor", True, "log reward queries, network passes and seconds"),
    CallbackOption("samples", "SampleLogger", True, "image grids of the base and the fine-tuned model", True),
    CallbackOption("export", "LoRAExport", True, "LoRA files of the last and the best step", True),
    CallbackOption("gradients", "GradientNormMonitor", True, "log gradient norms, act when they explode"),
    CallbackOption("checkpoint", "LastCheckpoint", True, "the checkpoint to resume from", True),
    CallbackOption("progress", "ProgressBar", True, "the progress bar"),
    CallbackOption("ema", "AdapterEMA", False, "moving average of the trained parameters"),
    CallbackOption("guard", "OverOptimizationGuard", False, "act when evaluation rewards fall", True),
    CallbackOption("conflict", "RewardConflict", False, "log the cosine between the gradients of rewards"),
)


def help_lines() -> list[str]:
    """Return one line for each option, for the help page of `fit`."""
    return [f"  --{option.key:11} {option.help}{_how_to_enable(option)}" for option in CALLBACK_OPTIONS]


def _how_to_enable(option: CallbackOption) -> str:
    return "" if option.enabled else f" (off; on with --{option.key} {option.class_name})"
