"""Select the content of a checkpoint, and check that it fits the module that loads it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_draft.errors import ConfigurationError

_ADVICE = "use the config.yaml in the folder of that run"


def is_reward_state(key: str) -> bool:
    """Return whether a key of a module's state dict is the state of a reward with running statistics."""
    return key.startswith("reward.") and key.endswith("_extra_state")


def keep_trained(
    checkpoint: dict[str, Any], parameters: Mapping[str, nn.Parameter], reward_state: Mapping[str, Any]
) -> None:
    """Reduce a checkpoint to the trained parameters and the rewards' states.

    Args:
        checkpoint: Lightning's checkpoint, which is changed in place.
        parameters: The trainable parameters by name.
        reward_state: The rewards' states by key, which replace those in the checkpoint.
    """
    state = checkpoint["state_dict"]
    kept = {key: value for key, value in state.items() if key in parameters or is_reward_state(key)}
    checkpoint["state_dict"] = {key: reward_state.get(key, value) for key, value in kept.items()}
    checkpoint["trained"] = sorted(parameters)


def check_checkpoint(
    checkpoint: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], compare_shapes: bool
) -> None:
    """Raise if a checkpoint does not contain the trainable parameters of this run.

    Args:
        checkpoint: Checkpoint from `keep_trained`; sharding strategies have already loaded the values and pass only
            names.
        parameters: The trainable parameters by name.
        compare_shapes: Whether `parameters` have their full shapes.

    Raises:
        ConfigurationError: Names or shapes differ.
    """
    saved = {name: value for name, value in checkpoint.get("state_dict", {}).items() if not is_reward_state(name)}
    different = sorted(parameters.keys() ^ set(checkpoint.get("trained", saved)))
    if different:
        raise ConfigurationError(
            f"the checkpoint contains other trainable parameters than this model ({len(different)} differ, such as "
            f"{different[0]!r}); {_ADVICE}"
        )
    for name, value in parameters.items() if compare_shapes else ():
        if name in saved and value.shape != saved[name].shape:
            reason = "the LoRA ranks differ" if ".lora_" in name else "the networks differ"
            raise ConfigurationError(
                f"the checkpoint's {name!r} has shape {tuple(saved[name].shape)} and this model's "
                f"{tuple(value.shape)}: {reason}; {_ADVICE}"
            )
