"""Model, sampler, prompts and rewards of the commands that generate images: `sample` and `guide`."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from lightning_draft.cli.messages import root_cause
from lightning_draft.cli.options import explain_parser_error
from lightning_draft.cli.score import build_rewards
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.methods.base import RewardModule
from lightning_draft.models import lora_files
from lightning_draft.models.lora_base import open_base
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import DDIM, FlowEuler, Sampler

BATCH = 8


@dataclass(frozen=True)
class Generation:
    """The objects with which `sample` and `guide` generate images.

    Args:
        model: The model, with the LoRA of `lora` loaded.
        sampler: The sampler.
        prompts: The prompts.
        rewards: By name; with a config the first one is the trained reward, `reward`.
        evaluation: Names of the rewards that were not trained on.
        lora: The LoRA file, if one was given.
    """

    model: PipelineModel
    sampler: Sampler
    prompts: Sequence[str]
    rewards: Mapping[str, Reward]
    evaluation: Sequence[str]
    lora: Path | None = None

    def score(self, samples: Samples, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores `(B,)` of `B` samples by the name of the reward."""
        return {name: reward(samples, prompts) for name, reward in self.rewards.items()}


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of both commands.

    Args:
        parser: The parser of the command.
        output: Default name of the image file.
    """
    parser.add_argument("lora", nargs="?")
    parser.add_argument("--config", "-c")
    parser.add_argument("--model")
    add_image_options(parser)
    parser.add_argument("--output", "-o", type=image_file, default=Path(output))


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the prompts, the rewards, the noise, the sampling steps, the image size and the device."""
    parser.add_argument("--reward", nargs="+", default=[])
    parser.add_argument("--rewards")
    parser.add_argument("--prompt", nargs="+")
    parser.add_argument("--prompts")
    parser.add_argument("--seed", type=_seed, nargs="+", default=[0])
    parser.add_argument("--max", type=_positive, default=8)
    parser.add_argument("--steps", type=_positive)
    parser.add_argument("--height", type=_positive)
    parser.add_argument("--width", type=_positive)
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")


def prepare(options: argparse.Namespace, command: str) -> Generation:
    """Build the objects that the options name, on the chosen device.

    Args:
        options: The parsed options.
        command: Name of the command, for messages.

    Raises:
        ConfigurationError: The options are not valid.
    """
    file, config = _sources(options, command)
    module, prompts = (None, None) if config is None else _build(config, command)
    if module is None:
        model: Any = open_base([] if file is None else [file], options.model, (options.height, options.width))
        sampler = default_sampler(model, options.steps)
    else:
        model, sampler = module.model, module.sampler
        sampler.num_steps = options.steps or sampler.num_steps
    if file is not None:
        model.load_lora(file)
    prompts = prompts_of(options) or prompts or model.default_prompts(options.max)
    if not prompts:
        raise ConfigurationError('there are no prompts; write --prompt "a cat" "a dog", or --prompts FILE')
    trained, evaluated = ({}, {}) if module is None else _rewards_of(module)
    if options.reward or options.rewards:
        evaluated |= build_rewards(options.reward, options.rewards)
    if trained.keys() & evaluated.keys():
        raise ConfigurationError("--rewards: the name 'reward' is that of the trained reward; choose another name")
    rewards = {**trained, **evaluated}
    for network in (model, *rewards.values()):
        network.to(options.device).eval()
    for reward in rewards.values():
        reward.requires_grad_(False)
    return Generation(model, sampler, prompts[: options.max], rewards, list(evaluated), file)


def default_sampler(model: PipelineModel, steps: int | None) -> Sampler:
    """Return the sampler of a model without a config: that of its family, or `FlowEuler` for flows and else `DDIM`."""
    kind, usual = (FlowEuler, 28) if model.prediction == "flow" else (DDIM, 50)
    return (model.family.sampler or kind)(steps or model.family.steps or usual)


def write_comparison(
    output: Path,
    prompts: Sequence[str],
    images: Mapping[str, Tensor],
    scores: Mapping[str, Mapping[str, Tensor]],
    title: str = "",
) -> None:
    """Print the mean scores, and write a grid with the images and the scores of the first reward.

    Args:
        output: The image file.
        prompts: Captions of the `N` images.
        images: By label, `(N, 3, H, W)`.
        scores: By label and reward, `(N,)`; empty without rewards.
        title: A line above the grid.
    """
    width = max(10, *map(len, images))
    for label, each in scores.items():
        print(
            f"{label:{width}} {'  '.join(f'{n} {float(v.double().mean()):.4g}' for n, v in each.items())}", flush=True
        )
    first = {label: next(iter(each.values())) for label, each in scores.items()} or None
    with atomic_path(output) as partial:
        comparison(prompts, images, first, title=title).save(partial)
    print(f"wrote {output}")


def captions(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the captions of the images: the prompts for each seed, with the seed if there are several."""
    if len(seeds) == 1:
        return list(prompts)
    return [f"{prompt} (seed {seed})" for seed in seeds for prompt in prompts]


def _rewards_of(module: RewardModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trained reward and the evaluation rewards by name."""
    return {"reward": module.reward}, dict(zip(module.eval_reward_names, module.eval_rewards, strict=True))


def _sources(options: argparse.Namespace, command: str) -> tuple[Path | None, Path | None]:
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
    if config is not None and (options.height or options.width):
        raise ConfigurationError(
            f"--height and --width need --model NAME; with a config, set height and width of the model in {config}"
        )
    if file is None and config is None and options.model is None:
        raise ConfigurationError(
            f"give a LoRA file, a run's folder, a --config or a --model; see lightning-draft {command} --help"
        )
    return file, config


def _build(config: Path, command: str) -> tuple[RewardModule, list[str]]:
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
        raise ConfigurationError(
            f"{config}: {command} does not support a {kind}: only a PipelineModel can load LoRA files and scale its "
            "adapters; derive the class from lightning_draft.models.PipelineModel"
        )
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


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Return the prompts that the options give, if any."""
    prompts: list[str] = list(options.prompt or [])
    return prompts + list(read_prompts(options.prompts) if options.prompts else [])


def _positive(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1; write 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number between 0 and 2^63 - 1; write 0")
    return int(text)


def image_file(text: str) -> Path:
    if Path(text).suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f"{text} is not an image file; write a name such as sample.png")
    return Path(text)


def _device(text: str) -> str:
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not available: {str(error).splitlines()[0]}") from error
    return text
