"""What a reward looks for: an argument of its own, or the prompt's metadata; and a model's labels by name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_draft.errors import ConfigurationError


def target_values(prompts: Sequence[str], name: str, own: Any, reward: str) -> list[Any]:
    """What to look for in the image of each prompt: `own` if given, else the prompt's metadata under `name`.

    Args:
        prompts: `B` prompts.
        name: Of the argument, of the key in the metadata, and of the column in a file of prompts.
        own: The reward's own argument; None to read the metadata.
        reward: Name of the reward's class, for messages.

    Returns:
        `B` values.

    Raises:
        ConfigurationError: A prompt has none.
    """
    if own is not None:
        return [own] * len(prompts)
    values = [getattr(prompt, "metadata", {}).get(name) for prompt in prompts]
    for prompt, value in zip(prompts, values, strict=True):
        if value is None or value == "":
            raise ConfigurationError(
                f"{reward} does not know what to look for in {str(prompt)!r}: the prompt has no {name!r} in its "
                f"metadata; write {name} among the reward's arguments, or take the prompts from a .jsonl or .csv file "
                f"that has a column {name}"
            )
    return values


class Labels:
    """The labels of a classifier or detector, found by number or by name, whatever the case.

    A label of several names, such as ImageNet's `tabby, tabby cat`, is found by each of them.

    Args:
        names: Name by number, as `config.id2label` holds them.
        source: Where they come from, for messages.
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
        """The number of a label.

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
