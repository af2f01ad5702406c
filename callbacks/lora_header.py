"""The metadata of exported LoRA files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from lightning_draft.methods.base import RewardModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scale_schedule import header_of
from lightning_draft.redaction import redact
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.combine import WeightedSum

_REWARD = "train/reward"
_NOT_SETTINGS = ("training", "differentiable", "uses_images", "uses_latents")


def header(trainer: L.Trainer, module: RewardModule, validated: bool = True) -> dict[str, str]:
    """Return the metadata of a file of adapters; every value is a string, and `scores` is JSON.

    Args:
        trainer: The trainer.
        module: Its module.
        validated: Whether the scores of the last validation belong to these adapters.
    """
    prefixes = ("val/", _REWARD) if validated else (_REWARD,)
    scores = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefixes) and math.isfinite(float(value))
    }
    return {
        **_of_model(module.model),
        **{name: describe(part) for name, part in module.strategies().items()},
        "step": str(trainer.global_step),
        "scores": json.dumps(scores, sort_keys=True),
    }


def _of_model(model: DiffusionModel) -> dict[str, str]:
    if not isinstance(model, PipelineModel):
        return {"base": model.source}
    sha256, schedule = model.source_sha256, None if model.lora is None else model.lora.scale_schedule
    return {
        "base": model.public_name,
        **({} if sha256 is None else {"base_sha256": sha256}),
        **header_of(schedule),
    }


def describe(thing: object) -> str:
    """Return class, plain public attributes and components, such as `LastK(k=1)`, without secrets and local folders."""
    plain = {
        name: _without_folder(redact(value, name))
        for name, value in vars(thing).items()
        if not name.startswith("_") and name not in _NOT_SETTINGS and isinstance(value, (bool, int, float, str))
    }
    shown = [f"{name}={value!r}" for name, value in plain.items()]
    shown += [f"{name}={component}" for name, component in _components(thing)]
    return f"{type(thing).__name__}({', '.join(shown)})"


def _components(thing: object) -> Iterator[tuple[str, str]]:
    """Yield names and descriptions of the rewards that a reward is computed from, with their weights."""
    if isinstance(thing, WeightedSum):
        for (name, weight), reward in zip(thing.weights.items(), thing.rewards, strict=True):
            yield name, describe(reward) if weight == 1 else f"{weight:g} * {describe(reward)}"
    elif isinstance(thing, Reward):
        inner = [*thing.named_children(), *thing.unregistered_rewards().items()]
        yield from ((name, describe(child)) for name, child in inner if isinstance(child, Reward))


def training_settings(trainer: L.Trainer, module: RewardModule) -> dict[str, str]:
    """Return the settings of a run that its model card lists besides those in the header of the file."""
    data = module.prompt_data
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups][:1]
    rates = [
        f"{type(trainer.optimizers[0]).__name__}, learning rate {group.get('initial_lr', group['lr']):g}"
        for group in groups
    ]
    images = None if data is None else data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    found = {
        "evaluation rewards": ", ".join(
            f"{name}: {describe(reward)}"
            for name, reward in zip(module.eval_reward_names, module.eval_rewards, strict=True)
        ),
        "optimizer": "".join(rates),
        "training prompts": "" if data is None else str(len(data.train_prompts)),
        "prompts per optimization step": "" if images is None else str(images),
        "precision": str(trainer.precision),
        "seed": str(module.seed),
    }
    return {name: value for name, value in found.items() if value}


def _without_folder(value: bool | int | float | str) -> bool | int | float | str:
    """Return the name of a file or folder that is given by an absolute path, and any other value as it is."""
    is_path = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(str(value)).name if is_path else value
