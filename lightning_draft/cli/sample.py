"""The command `sample`: images of the same prompts and noise at several scales of a LoRA file."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.generation import BATCH, add_options, captions, prepare, write_comparison
from lightning_draft.cli.messages import as_configuration_error
from lightning_draft.cli.schedule_options import add_schedule, scale_schedule
from lightning_draft.errors import ConfigurationError
from lightning_draft.scale_sweep import ScaleSweep, save_plot, sweep


def main(args: Sequence[str]) -> int:
    """Parse the arguments, generate the images, write one image file, and return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = _parse(args)
    with as_configuration_error():
        _sample(options)
    return 0


def _sample(options: argparse.Namespace) -> None:
    schedule = None if options.schedule is None else scale_schedule(options)
    if schedule is None and options.interpolate is not None:
        raise ConfigurationError(f"--interpolate {options.interpolate} needs a schedule; write --schedule linear")
    generation = prepare(options, "sample")
    if schedule is not None:
        generation.model.set_scale_schedule(schedule)
    scales = sum(options.scale or [], []) or ([0.0] if generation.lora is None else [0.0, 1.0])
    found = sweep(
        generation.model,
        generation.sampler,
        generation.prompts,
        scales,
        generation.score if generation.rewards else None,
        evaluation=generation.evaluation,
        seeds=options.seed,
        batch_size=BATCH,
    )
    title = "" if schedule is None else f"scale schedule {options.schedule}, interpolated {schedule.interpolate}"
    _write(found, captions(generation.prompts, options.seed), options.output, title)


def _write(found: ScaleSweep, prompts: Sequence[str], output: Path, title: str) -> None:
    """Print the means, and write the image grid and, for several scales with rewards, the plot."""
    labels = {scale: f"scale {scale:g}" if scale else "base" for scale in found.images}
    images = {label: found.images[scale] for scale, label in labels.items()}
    scores = {label: found.scores[scale] for scale, label in labels.items()} if found.rewards else {}
    write_comparison(output, prompts, images, scores, title)
    best = found.best_scale()
    if best is None or len(found.images) < 3:
        return
    plot = output.with_name(f"{output.stem}_scales.png")
    save_plot(found, plot)
    hint = ", the largest that was sampled: try larger ones" if best[0] == max(found.images) else ""
    print(f"wrote {plot}\nbest scale by {best[1]}: {best[0]:g}{hint}")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("lightning-draft sample")
    add_options(parser, "sample.png")
    add_schedule(parser)
    parser.add_argument("--scale", type=_scales, nargs="+")
    return parser.parse_args(args)


def _scales(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} must contain finite numbers only; write for example 0 0.5 1")
    return numbers
