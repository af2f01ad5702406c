"""Targets of rewards, from an argument or from the prompts' metadata, and labels of models by name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt import metadata_of


def target_values(prompts: Sequence[str], name: str, own: Any, reward: str) -> list[Any]:
    """Return the target of each prompt: `own` if it is given, else the metadata `name` of the prompt.

    Args:
        prompts: `B` prompts.
        name: Name of the argument and of the metadata, which is a column of a prompt file.
        own: The argument of the reward; None to read the metadata.
        reward: Name of the reward's class, for messages.

    Returns:
        `B` values.

    Raises:
        ConfigurationError: A prompt has no target.
    """
    if own is not None:
        return [own] * len(prompts)
    values = [metadata_of(prompt).get(name) for prompt in prompts]
    for prompt, value in zip(prompts, values, strict=True):
        if value is None or value == "":
            raise ConfigurationError(
                f"{reward} has no {name!r} for the prompt {str(prompt)!r}: it is neither an argument nor in the "
                f"prompt's metadata; set {name} among the reward's arguments, or read the prompts from a .jsonl or "
                f".csv file with a column {name}"
            )
    return values


class Labels:
    """The labels of a classifier or detector, found by number or by name, regardless of case.

    A label with several names, such as ImageNet's `tabby, tabby cat`, is found by each of them.

    Args:
        names: Names by number, such as `config.id2label`.
        source: Where the labels come from, for messages.
    """

    def __init__(self, names: Mapping[int, str], source: str) -> None:
        self.names = {int(number): name for number, name in names.items()}
        self.source = source
        self._numbers: dict[str, int] = {}
        for number, name in self.names.items():
            self._numbers.setdefault(_key(name), number)
        for number, name in self.names.items():
            for synonym in name.split(","):
                self._numbers.setdefault(_key(synonym), number)

    def number(self, label: str | int) -> int:
        """Return the number of a label.

        Raises:
            ConfigurationError: There is no such label; the message names the nearest.
        """
        found = self._numbers.get(_key(str(label)))
        if found is not None:
            return found
        if str(label).isdecimal() and int(label) in self.names:
            return int(label)
        near = difflib.get_close_matches(_key(str(label)), self._numbers, n=3, cutoff=0.5)
        advice = f"the nearest are {', '.join(near)}" if near else f"for example {', '.join(list(self._numbers)[:3])}"
        raise ConfigurationError(
            f"{label!r} is not among the {len(self.names)} labels of {self.source}; write one of them, or its number: "
            f"{advice}"
        )


def _key(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
