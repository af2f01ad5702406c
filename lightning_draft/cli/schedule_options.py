"""The command-line options of the scale schedule of a LoRA."""

import argparse
from dataclasses import replace
from typing import get_args

from lightning_draft.models.scale_schedule import Interpolation, ScaleSchedule


def add_schedule(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the options `--schedule` and `--interpolate`."""
    parser.add_argument("--schedule", required=required)
    parser.add_argument("--interpolate", choices=get_args(Interpolation))


def scale_schedule(options: argparse.Namespace) -> ScaleSchedule:
    """Return the schedule of the parsed options.

    Raises:
        ConfigurationError: The text of `--schedule` is not valid.
    """
    schedule = ScaleSchedule.from_text(options.schedule)
    return schedule if options.interpolate is None else replace(schedule, interpolate=options.interpolate)
