"""The command `lora`: information about LoRA files, and conversion, scaling, mixing and merging of them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_draft.cli.base_model import open_base
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.models import lora_edit, lora_writing
from lightning_draft.models.decoder import Precision
from lightning_draft.models.loading import torch_dtype
from lightning_draft.models.lora_files import LoRAFile
from lightning_draft.models.lora_merge import merge
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.weightless import without_weights

_SHOWN = 12


def main(args: Sequence[str]) -> int:
    """Run `lora info`, `convert`, `scale`, `mix` or `merge`, and return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = parser().parse_args(args)
    command = {"info": _info, "convert": _convert, "scale": _scale, "mix": _mix, "merge": _merge}[options.command]
    command(options)
    if getattr(options, "prompt", None):
        _grid(options)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parsed = CommandParser("lightning-draft lora")
    commands = parsed.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info")
    info.add_argument("files", nargs=1)
    info.add_argument("--all", action="store_true")
    convert = commands.add_parser("convert")
    convert.add_argument("files", nargs=1)
    scale = commands.add_parser("scale")
    scale.add_argument("files", nargs=1)
    scale.add_argument("factor", type=float)
    mix = commands.add_parser("mix")
    mix.add_argument("files", nargs="+")
    merging = commands.add_parser("merge")
    merging.add_argument("files", nargs=1)
    merging.add_argument("--scale", type=float, default=1.0)
    for command in (info, convert, scale, mix, merging):
        command.add_argument("--model")
    for command in (convert, scale, mix, merging):
        command.add_argument("--output", "-o", required=True, type=Path)
    for command in (convert, scale, mix):
        command.add_argument("--format", choices=get_args(lora_writing.Format), default="diffusers")
        command.add_argument("--dtype", choices=get_args(Precision), default="float32")
        command.add_argument("--rank", type=int)
        command.add_argument("--prompt", nargs="+")
        command.add_argument("--reward", nargs="+", default=[])
        command.add_argument("--grid", type=Path)
    return parsed


def _info(options: argparse.Namespace) -> None:
    model, (file,) = _open(options.files, options.model)
    for name, value in sorted(file.metadata.items()):
        print(f"{name}: {value}")
    rows = lora_edit.info(file, model.family.denoiser)
    total = sum(row.norm**2 for row in rows) ** 0.5
    print(f"{len(rows)} layers, ranks {sorted({row.rank for row in rows})}, |dW| = {total:.6g}, all values are finite")
    print(f"{'|dW|':>12}  rank  alpha  layer")
    for row in rows if options.all else rows[:_SHOWN]:
        print(f"{row.norm:12.6g}  {row.rank:4}  {row.alpha:5g}  {row.component}.{row.layer}")
    if not options.all and len(rows) > _SHOWN:
        print(f"and {len(rows) - _SHOWN} more layers: write --all")


def _convert(options: argparse.Namespace) -> None:
    model, (file,) = _open(options.files, options.model)
    _write(_resized(file, options.rank), model, options, file.metadata)


def _scale(options: argparse.Namespace) -> None:
    model, (file,) = _open(options.files, options.model)
    scaled = lora_edit.scale(_resized(file, options.rank), options.factor)
    _write(scaled, model, options, {**file.metadata, "scaled_by": str(options.factor)})


def _mix(options: argparse.Namespace) -> None:
    names, weights = zip(*map(_weighted, options.files), strict=True)
    model, files = _open(names, options.model)
    mixed, error = lora_edit.mix(files, weights, options.rank)
    print(f"rank {mixed.rank}, relative error of dW {error:.3g}")
    parts = {Path(name).name: weight for name, weight in zip(names, weights, strict=True)}
    _write(mixed, model, options, {"base": model.source, "mix": json.dumps(parts), "relative_error": f"{error:.3g}"})


def _merge(options: argparse.Namespace) -> None:
    model, (file,) = _open(options.files, options.model)
    merge(model, file, options.output, options.scale, {**file.metadata, "merged_scale": str(options.scale)})
    print(f"wrote {options.output}")


def _weighted(text: str) -> tuple[str, float]:
    """Return file and weight of `FILE:WEIGHT`; the weight is 1 by default."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _open(names: Sequence[str], base: str | None) -> tuple[PipelineModel, list[LoRAFile]]:
    """Return the base model without its weights, by default the one that a header names, and the files as its LoRAs."""
    files = [Path(name).expanduser() for name in names]
    with without_weights():
        model = open_base(files, base)
    return model, [model.read_lora(file) for file in files]


def _resized(file: LoRAFile, rank: int | None) -> LoRAFile:
    if rank is None:
        return file
    resized, error = lora_edit.resize(file, rank)
    print(f"rank {file.rank} to {rank}, relative error of dW {error:.3g}")
    return resized


def _write(file: LoRAFile, model: PipelineModel, options: argparse.Namespace, metadata: Any) -> None:
    updates = {model.family.denoiser: file.denoiser, **file.encoders}
    header = {"base": model.source, **{k: v for k, v in metadata.items() if k != "format"}}
    dtype = torch_dtype(options.dtype)
    lora_writing.write(options.output, updates, header, model.family, model.denoiser.config, options.format, dtype)
    print(f"wrote {options.output}")


def _grid(options: argparse.Namespace) -> None:
    """Write images of the base model and of the new file, with scores."""
    from lightning_draft.cli.sample import main as sample

    place = options.grid or options.output.with_suffix(".png")
    base = ["--model", options.model] if options.model else []
    rewards = ["--reward", *options.reward] if options.reward else []
    sample([str(options.output), *base, "--prompt", *options.prompt, *rewards, "--output", str(place)])
