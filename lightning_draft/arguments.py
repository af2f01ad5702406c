"""Checks of constructor arguments; each returns the value or raises `ConfigurationError`.

A message names the option, the value, the reason, and a value that works.
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from lightning_draft.errors import ConfigurationError

Number = TypeVar("Number", int, float)
Option = TypeVar("Option")


def at_least(name: str, value: Number, minimum: Number, hint: str = "") -> Number:
    """Return `value` if it is a number of at least `minimum`.

    Args:
        name: The option as the user writes it.
        value: The given value; NaN and infinity are rejected.
        minimum: Smallest valid value.
        hint: What to write instead; by default `write {minimum} or more`.

    Raises:
        ConfigurationError: `value` is not a number, or is too small.
    """
    if not _is_number(value) or not minimum <= value < math.inf:
        bound = "finite and " if value == math.inf else ""
        raise ConfigurationError(
            f"{name}={value!r} must be {bound}at least {minimum}; {hint or f'write {minimum} or more'}"
        )
    return value


def integer(name: str, value: Any, hint: str = "write a whole number such as 4") -> int:
    """Return `value` if it is an integer.

    Raises:
        ConfigurationError: It is another number, such as 4.0, or no number.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} must be an integer; {hint}")
    return int(value)


def integer_at_least(name: str, value: Any, minimum: int, hint: str = "") -> int:
    """Return `value` if it is an integer of at least `minimum`; arguments as of `at_least`.

    Raises:
        ConfigurationError: `value` is not an integer, or is too small.
    """
    return at_least(name, integer(name, value, hint or f"write {minimum} or more"), minimum, hint)


def positive(name: str, value: float, hint: str = "") -> float:
    """Return `value` if it is finite and greater than 0.

    Raises:
        ConfigurationError: It is not a positive number.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{name}={value!r} must be a positive number; {hint or 'write a value greater than 0, such as 1.0'}"
        )
    return value


def finite(name: str, value: float, hint: str = "write a number such as 1.0") -> float:
    """Return `value` if it is a finite number.

    Raises:
        ConfigurationError: It is not a finite number.
    """
    if not is_finite(value):
        raise ConfigurationError(f"{name}={value!r} must be a finite number; {hint}")
    return value


def in_range(
    name: str, value: Number, low: Number, high: Number, hint: str = "", *, below_high: bool = False
) -> Number:
    """Return `value` if `low <= value <= high`, or with `below_high` if `low <= value < high`.

    Raises:
        ConfigurationError: It is outside this range.
    """
    if not _is_number(value) or not low <= value <= high or (below_high and value == high):
        bounds = f"at least {low} and less than {high}" if below_high else f"between {low} and {high}"
        raise ConfigurationError(f"{name}={value!r} must be {bounds}; {hint or f'write a value such as {low}'}")
    return value


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is True or False.

    Raises:
        ConfigurationError: It is another value, such as the text "false", which Python takes for true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigurationError(f"{name}={value!r} must be true or false; write true")
    return bool(value)


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ConfigurationError: `value` is another; the message suggests the most similar choice.
    """
    known = list(choices)
    if value not in known:
        similar = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {similar[0]}" if similar else ""
        raise ConfigurationError(f"{name}={value!r} is not a valid choice; write one of {', '.join(known)}{hint}")
    return value


def prompt_list(prompts: Any, name: str = "prompts") -> list[str]:
    """Return the prompts as a list if they are a non-empty sequence of strings.

    Raises:
        ConfigurationError: `prompts` is a single string, or not a non-empty sequence of strings.
    """
    if isinstance(prompts, str):
        raise ConfigurationError(f"{name}={prompts!r} is one string; write a list of strings, such as [{prompts!r}]")
    if not isinstance(prompts, Sequence) or not prompts:
        got = type(prompts).__name__ if not isinstance(prompts, Sequence) else f"an empty {type(prompts).__name__}"
        raise ConfigurationError(f"{name} must be a non-empty list of strings, got {got}; write for example ['a cat']")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigurationError(
                f"{name} must be a list of strings, and one element is {prompt!r} ({type(prompt).__name__}); "
                "pass the text of each prompt"
            )
    return list(prompts)


def given(**options: Option | None) -> dict[str, Option]:
    """Return the options that are not `None`, by name."""
    return {name: option for name, option in options.items() if option is not None}


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return _is_number(value) and abs(value) < math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
