"""The command `sample`: images of the same prompts and noise at several scales of a LoRA file."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor

from lightning_draft.callbacks.image_grid import comparison
from lightning_draft.cli import run_folder, shipped
from lightning_draft.cli.base_model import open_base
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.messages import as_configuration_error, root_cause
from lightning_draft.cli.options import explain_parser_error
from lightning_draft.cli.score import build_rewards
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.methods.base import RewardModule
from lightning_draft.models import lora_files
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.samplers import DDIM, FlowEuler, Sampler
from lightning_draft.scale_sweep import ScaleSweep, save_plot, sweep

BATCH = 8


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
    file, config = _sources(options)
    module, prompts = (None, None) if config is None else _build(config)
    if module is None:
        model: Any = open_base([] if file is None else [file], options.model)
        sampler: Sampler = FlowEuler(options.steps or 28) if model.prediction == "flow" else DDIM(options.steps or 50)
    else:
        model, sampler = module.model, module.sampler
        sampler.num_steps = options.steps or sampler.num_steps
    if file is not None:
        model.load_lora(file)
    prompts = _prompts(options) or prompts
    if not prompts:
        raise ConfigurationError('there are no prompts; write --prompt "a cat" "a dog", or --prompts FILE')
    prompts = prompts[: options.max]
    scales = sum(options.scale or [], []) or ([0.0] if file is None else [0.0, 1.0])
    extra = build_rewards(options.reward, options.rewards) if options.reward or options.rewards else {}
    for reward in extra.values():
        reward.eval().requires_grad_(False).to(options.device)
    target: Any = model if module is None else module
    target.to(options.device).eval()
    trained = () if module is None else ("reward", *module.eval_reward_names)

    def score(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        own = {} if module is None else module.score(images, prompts)
        return {
            **{name: own[name] for name in trained},
            **{name: each(images, prompts) for name, each in extra.items()},
        }

    evaluation = [*trained[1:], *extra]
    scores_anything = module is not None or extra
    found = sweep(
        model,
        sampler,
        prompts,
        scales,
        score if scores_anything else None,
        evaluation=evaluation,
        seeds=options.seed,
        batch_size=BATCH,
    )
    _write(found, options)


def _write(found: ScaleSweep, options: argparse.Namespace) -> None:
    """Print the means, and write the image grid and, for several scales with rewards, the plot."""
    labels = {scale: f"scale {scale:g}" if scale else "base" for scale in found.images}
    for scale, label in labels.items() if found.scores else ():
        print(f"{label:10} {'  '.join(f'{name} {found.mean(name, scale):.4g}' for name in found.rewards)}", flush=True)
    count = len(found.prompts) // len(options.seed)
    names = list(found.prompts)
    if len(options.seed) > 1:
        names = [f"{prompt} (seed {options.seed[i // count]})" for i, prompt in enumerate(found.prompts)]
    shown = found.rewards[0] if found.rewards else ""
    images = {label: found.images[scale] for scale, label in labels.items()}
    scores = {label: found.scores[scale][shown] for scale, label in labels.items()} if shown else None
    with atomic_path(options.output) as partial:
        comparison(names, images, scores).save(partial)
    print(f"wrote {options.output}")
    best = found.best_scale()
    if best is None or len(found.images) < 3:
        return
    plot = options.output.with_name(f"{options.output.stem}_scales.png")
    save_plot(found, plot)
    hint = ", the largest that was sampled: try larger ones" if best[0] == max(found.images) else ""
    print(f"wrote {plot}\nbest scale by {best[1]}: {best[0]:g}{hint}")


def _sources(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Return the LoRA file and the config: the given ones, or those of the run's folder that contains the file."""
    file = None if options.lora is None else Path(options.lora).expanduser()
    config = None if options.config is None else shipped.locate(options.config)
    if file is not None and file.is_dir():
        folder, file = file, run_folder.adapters(file)
    elif file is not None:
        folder = file.parent.parent
        lora_files.check(file)
    if file is not None and config is None and options.model is None and (folder / "config.yaml").is_file():
        config = folder / "config.yaml"
    if config is not None and options.model is not None:
        raise ConfigurationError("give --config or --model, not both")
    if file is None and config is None and options.model is None:
        raise ConfigurationError("give a LoRA file, a run's folder, a --config or a --model; see sample --help")
    return file, config


def _build(config: Path) -> tuple[RewardModule, list[str]]:
    """Return the module of a config, and its held-out prompts."""
    content = _load(config)
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_subclass_arguments(RewardModule, "model")
    parser.add_class_arguments(PromptDataModule, "data")
    try:
        parsed = parser.parse_object({key: content[key] for key in ("model", "data") if key in content})
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{config}: {explain_parser_error(error)}") from error
    try:
        built = parser.instantiate(parsed)
    except Exception as error:
        raise root_cause(error) from None
    if not isinstance(built.model.model, PipelineModel):
        kind = type(built.model.model).__name__
        raise ConfigurationError(f"{config}: sample does not support a {kind}; the model must be a diffusers pipeline")
    return built.model, list(built.data.val_prompts or built.data.train_prompts)


def _load(config: Path) -> dict[str, Any]:
    """Return the content of a config, with interpolations resolved."""
    shipped.read(config)
    try:
        content = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{config}: {str(error).splitlines()[0]}") from error
    except yaml.MarkedYAMLError as error:
        raise shipped.yaml_error(config, error) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(options.prompt or [])
    return prompts + list(read_prompts(options.prompts) if options.prompts else [])


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("lightning-draft sample")
    parser.add_argument("lora", nargs="?")
    parser.add_argument("--config", "-c")
    parser.add_argument("--model")
    parser.add_argument("--scale", type=_scales, nargs="+")
    parser.add_argument("--reward", nargs="+", default=[])
    parser.add_argument("--rewards")
    parser.add_argument("--prompt", nargs="+")
    parser.add_argument("--prompts")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--max", type=_positive, default=8)
    parser.add_argument("--steps", type=_positive)
    parser.add_argument("--output", "-o", type=_image_file, default=Path("sample.png"))
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(args)


def _positive(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be an integer")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _scales(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text} must be finite numbers; write for example 0 0.5 1")
    return numbers


def _image_file(text: str) -> Path:
    if Path(text).suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f"{text} is not an image file; write a name such as sample.png")
    return Path(text)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not available: {str(error).splitlines()[0]}") from error
    return text
