"""The seeds of a run: `seed_everything`, and the seeds that follow it unless they are written."""

import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import seed_everything

from lightning_draft.cli.messages import flatten
from lightning_draft.errors import ConfigurationError

FOLLOWING = ("model.seed", "model.model.lora.seed", "data.seed")
"""The options that take the value of `seed_everything` if they are not written."""
MAX_SEED = 2**32 - 1
HELP = (
    f"Seed of Python, numpy and torch, and the value of {', '.join(FOLLOWING)} where these are not written. true: a "
    "random seed, which a resumed run keeps; false: nothing is seeded, and these are 0."
)


def set_seeds(config: Namespace, saved: Mapping[str, Any]) -> None:
    """Seed Python, numpy and torch, and set each seed of the options that is not written.

    Args:
        config: The parsed options; changed in place, so that they contain the seeds that are used.
        saved: Options by full name of the run that is resumed, whose seeds it keeps; empty for a new run.

    Raises:
        ConfigurationError: A random seed is wanted, and the processes cannot agree on one.
    """
    if config["seed_everything"] is True:
        before = saved.get("seed_everything")
        kept = before is not None and not isinstance(before, bool)
        config["seed_everything"] = before if kept else chosen_at_random(config["trainer"]["num_nodes"])
    if config["seed_everything"] is not False:
        seed_everything(config["seed_everything"], workers=True)
    fill_seeds(config, saved)


def chosen_at_random(num_nodes: int = 1) -> int:
    """Return a random seed; all processes of a run that Lightning starts have the same one.

    They inherit the seed of the first process as `PL_GLOBAL_SEED`. In a run of a single process this variable is
    ignored, because it is left over from an earlier run.

    Args:
        num_nodes: Number of nodes of the run.

    Raises:
        ConfigurationError: Several processes were started by torchrun, SLURM or the user, which cannot agree on a seed.
    """
    sizes = [num_nodes, *(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))]
    if max(sizes) == 1:
        return random.SystemRandom().randint(0, MAX_SEED)
    given = os.environ.get("PL_GLOBAL_SEED", "")
    if not given.isdecimal():
        raise ConfigurationError(
            "--seed_everything=true cannot be used on several nodes or with processes that torchrun or SLURM started, "
            "since each would choose another seed; write a number such as 1"
        )
    return int(given)


def fill_seeds(config: Namespace, saved: Mapping[str, Any]) -> None:
    """Set each seed of `FOLLOWING` that is not written.

    Args:
        config: The parsed options; changed in place.
        saved: Options by full name of the run that is resumed, whose seeds it keeps; empty for a new run.
    """
    for name in FOLLOWING:
        group, _, key = name.rpartition(".")
        options = _arguments(config, group)
        if options is not None and key in options and options[key] is None:
            options[key] = saved.get(name, int(config["seed_everything"]))


def saved_options(checkpoint: Path | None) -> dict[str, Any]:
    """Return the options by full name that a run saved in its checkpoint, or nothing if it cannot be read."""
    if checkpoint is None:
        return {}
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return flatten(yaml.safe_load(content["callbacks"]["RunRecord"]["config"]))
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
        return {}


def _arguments(config: Namespace, name: str) -> Any:
    """Return the arguments of the class of an option, such as `model.model`, or `None` if it is off."""
    options: Any = config
    for part in name.split("."):
        options = options.get(part) if isinstance(options, Namespace) else None
        if isinstance(options, Namespace) and "init_args" in options:
            options = options["init_args"]
    return options if isinstance(options, Namespace) else None
