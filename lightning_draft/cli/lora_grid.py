"""The image grid of the command `lora`: base model, given files and result from the same noise, with scores."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_draft.cli.generation import BATCH, captions, default_sampler, prompts_of, write_comparison
from lightning_draft.cli.score import build_rewards
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_generation import generate, score_samples
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import Sampler


@dataclass(frozen=True)
class Shown:
    """One image of each panel.

    Args:
        label: Its label.
        model: The model; it is used for several images.
        lora: The LoRA file, if any.
        scale: Its strength.
    """

    label: str
    model: PipelineModel
    lora: Path | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class GridContent:
    """The prompts and the rewards of a grid.

    Args:
        prompts: The prompts.
        rewards: The rewards by name, on the chosen device; there may be none.
    """

    prompts: Sequence[str]
    rewards: Mapping[str, Reward]


def grid_content(options: argparse.Namespace) -> GridContent | None:
    """Return the prompts and rewards that the options name, before any file is written; None if no grid is wanted.

    Raises:
        ConfigurationError: There are rewards and no prompts, or the prompts or rewards are not valid.
    """
    prompts = prompts_of(options)[: options.max]
    if not prompts:
        if options.reward or options.rewards or options.grid:
            raise ConfigurationError('a scored grid needs prompts; write --prompt "a cat" "a dog", or --prompts FILE')
        return None
    rewards = build_rewards(options.reward, options.rewards) if options.reward or options.rewards else {}
    for reward in rewards.values():
        reward.eval().requires_grad_(False).to(options.device)
    return GridContent(prompts, rewards)


def write_grid(shown: Sequence[Shown], output: Path, content: GridContent, options: argparse.Namespace) -> None:
    """Generate images of the same prompts and noise, print their mean scores, and write the grid."""
    prompts, rewards = list(content.prompts), content.rewards
    every = prompts * len(options.seed)
    images, scores = {}, {}
    for each in shown:
        samples = _samples(each, default_sampler(each.model, options.steps), prompts, options)
        images[each.label] = samples.content
        if rewards:
            scores[each.label] = score_samples(
                lambda x, p: {name: reward(x, p) for name, reward in rewards.items()},
                samples,
                every,
                torch.device(options.device),
                BATCH,
            )
    write_comparison(output, captions(prompts, options.seed), images, scores)


def _samples(shown: Shown, sampler: Sampler, prompts: Sequence[str], options: argparse.Namespace) -> Samples:
    model = shown.model.eval().to(options.device)
    if shown.lora is not None:
        model.load_lora(shown.lora)
    made = [generate(model, sampler, prompts, seed, shown.scale, BATCH) for seed in options.seed]
    if shown.lora is not None:
        model.unload_lora()
    return Samples.concatenate(made)
