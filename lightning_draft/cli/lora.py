"""The command `lora`: information about LoRA files, and conversion, scaling, mixing, annealing and merging of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.generation import add_image_options, image_file
from lightning_draft.cli.lora_grid import GridContent, Shown, grid_content, write_grid
from lightning_draft.cli.messages import as_configuration_error, printable
from lightning_draft.cli.schedule_options import add_schedule, scale_schedule
from lightning_draft.models import lora_writing
from lightning_draft.models.decoder import Precision
from lightning_draft.models.lora_base import open_base, read_lora, read_loras
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.models.lora_edit import anneal_lora, lora_info, mix_loras, resize_lora, scale_lora
from lightning_draft.models.lora_merge import merge_lora
from lightning_draft.models.precisions import torch_dtype

_SHOWN = 12


def main(args: Sequence[str]) -> int:
    """Run `lora info`, `convert`, `scale`, `mix`, `anneal` or `merge`, and return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = parser().parse_args(args)
    with as_configuration_error():
        if options.command == "info":
            _info(options)
            return 0
        content = grid_content(options)
        names, weights = zip(*map(_weighted if options.command == "mix" else _whole, options.files), strict=True)
        files = read_loras(names, options.model)
        if options.command == "merge":
            merge_lora(files[0], options.output, options.scale)
        else:
            lora_writing.write_lora(
                _edited(files, weights, options), options.output, options.format, torch_dtype(options.dtype)
            )
        print(f"wrote {options.output}")
        if content is not None:
            _grid([file.path for file in files], content, options)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parsed = CommandParser("lightning-draft lora")
    commands = parsed.add_subparsers(dest="command", required=True)
    each = {name: commands.add_parser(name) for name in ("info", "convert", "scale", "mix", "anneal", "merge")}
    for name, command in each.items():
        command.add_argument("files", nargs="+" if name == "mix" else 1)
        command.add_argument("--model")
    each["info"].add_argument("--all", action="store_true")
    each["scale"].add_argument("factor", type=float)
    each["merge"].add_argument("--scale", type=float, default=1.0)
    add_schedule(each["anneal"], required=True)
    for name in ("convert", "scale", "mix", "anneal", "merge"):
        each[name].add_argument("--output", "-o", required=True, type=Path)
        each[name].add_argument("--grid", type=image_file)
        add_image_options(each[name])
    for name in ("convert", "scale", "mix", "anneal"):
        each[name].add_argument("--format", choices=get_args(lora_writing.Format), default="diffusers")
        each[name].add_argument("--dtype", choices=get_args(Precision), default="float32")
        each[name].add_argument("--rank", type=int)
    return parsed


def _info(options: argparse.Namespace) -> None:
    file = read_lora(options.files[0], options.model)
    for name, value in sorted(file.metadata.items()):
        print(printable(f"{name}: {value}"))
    rows = lora_info(file)
    total = sum(row.norm**2 for row in rows) ** 0.5
    print(f"{len(rows)} layers, ranks {sorted({row.rank for row in rows})}, |dW| = {total:.6g}, all values are finite")
    print(f"{'|dW|':>12}  rank  alpha  layer")
    for row in rows if options.all else rows[:_SHOWN]:
        print(printable(f"{row.norm:12.6g}  {row.rank:4}  {row.alpha:5g}  {row.component}.{row.layer}"))
    if not options.all and len(rows) > _SHOWN:
        print(f"and {len(rows) - _SHOWN} more layers: write --all")


def _edited(files: Sequence[LoRAFile], weights: Sequence[float], options: argparse.Namespace) -> LoRAFile:
    """Return the result of `convert`, `scale`, `mix` or `anneal`."""
    if options.command == "mix":
        mixed, error = mix_loras(files, weights, options.rank)
        print(f"rank {mixed.rank}, relative error of dW {error:.3g}")
        return mixed
    file = _resized(files[0], options.rank)
    if options.command == "scale":
        return scale_lora(file, options.factor)
    return anneal_lora(file, scale_schedule(options)) if options.command == "anneal" else file


def _resized(file: LoRAFile, rank: int | None) -> LoRAFile:
    if rank is None:
        return file
    resized, error = resize_lora(file, rank)
    print(f"rank {file.rank} to {rank}, relative error of dW {error:.3g}")
    return resized


def _whole(text: str) -> tuple[str, float]:
    return text, 1.0


def _weighted(text: str) -> tuple[str, float]:
    """Return file and weight of `FILE:WEIGHT`; the weight is 1 by default."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _grid(files: Sequence[Path], content: GridContent, options: argparse.Namespace) -> None:
    """Write images of the base model, of the given files, and of the result."""
    size = (options.height, options.width)
    base = open_base(files, options.model, size)
    scale = options.scale if options.command == "merge" else 1.0
    shown = [Shown("base", base), *(Shown(name, base, file, scale) for name, file in _labels(files).items())]
    if options.command == "merge":
        merged = open_base([], str(options.output), size)
        shown.append(Shown(f"{options.output.name} (merged)", merged))
    else:
        shown.append(Shown(f"{options.output.name} (new)", base, options.output))
    write_grid(shown, options.grid or options.output.with_suffix(".png"), content, options)


def _labels(files: Sequence[Path]) -> dict[str, Path]:
    """Return the files by name, with a number if several have the same."""
    names = [file.name for file in files]
    return {name if names.count(name) == 1 else f"{name} {i + 1}": files[i] for i, name in enumerate(names)}
