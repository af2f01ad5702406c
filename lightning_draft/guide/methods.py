"""The methods by name, with their main parameter."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_draft.arguments import one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.guide.best_of_n import best_of_n
from lightning_draft.guide.gradient import gradient_guidance, norm_matched_guidance
from lightning_draft.guide.noise import dno, reno


@dataclass(frozen=True)
class Method:
    """A method with a value of its main parameter.

    Args:
        name: Its name, a key of `METHODS`.
        function: Called with a chain, noise, a reward of latents and the parameter; returns latents.
        parameter: Name of the main parameter of `function`.
        value: Its value.
        is_count: Whether the parameter is an integer of at least 1.
        needs_gradient: Whether the reward must be differentiable.
        through_chain: Whether the gradient passes through all steps, so that their activations must be recomputed.
    """

    name: str
    function: Callable[..., Tensor]
    parameter: str
    value: float
    is_count: bool = False
    needs_gradient: bool = True
    through_chain: bool = False

    @property
    def label(self) -> str:
        """The name and the value."""
        return f"{self.name} {self.value:g}"

    def arguments(self) -> dict[str, Any]:
        """Return the main parameter as a keyword argument of `function`."""
        return {self.parameter: int(self.value) if self.is_count else self.value}


METHODS = {
    method.name: method
    for method in (
        Method("best_of_n", best_of_n, "n", 8, is_count=True, needs_gradient=False),
        Method("gradient", gradient_guidance, "scale", 1.0),
        Method("norm_matched", norm_matched_guidance, "scale", 0.1),
        Method("reno", reno, "iterations", 10, is_count=True, through_chain=True),
        Method("dno", dno, "iterations", 10, is_count=True, through_chain=True),
    )
}


def parse_method(text: str) -> Method:
    """Return the method of `NAME` or `NAME:VALUE`, such as `gradient:3`.

    Raises:
        ConfigurationError: There is no such method, or the value is not valid.
    """
    name, colon, value = text.partition(":")
    method = METHODS[one_of("--method", name, METHODS)]
    if not colon:
        return method
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    valid = math.isfinite(number) and (not method.is_count or (number >= 1 and number == int(number)))
    if not valid:
        kind = "an integer of at least 1" if method.is_count else "a number"
        raise ConfigurationError(
            f"--method {text}: the {method.parameter} of {name} must be {kind}; write {name}:{method.value:g}"
        )
    return replace(method, value=number)
