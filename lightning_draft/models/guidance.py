"""Classifier-free guidance.

References:
    Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.arguments import at_least, is_finite, one_of, positive
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.latents import pack, unpack
from lightning_draft.prompt import NEGATIVE_COLUMN, metadata_of
from lightning_draft.prompt_table import PromptTable

GuidanceGradient = Literal["full", "conditional"]
Network = Callable[[Tensor, Conditioning], Tensor]
Rescale = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Guidance: `e = e_u + w (e_c - e_u)`, with `e_c` given the prompt and `e_u` the negative prompt.

    Args:
        scale: `w`, at least 0; with 1, `e_u` is not computed. By default the published value of the model family, such
            as 7.5 for Stable Diffusion 1.x.
        negative_prompt: The prompt of `e_u`; prompts with a value in the column `negative_prompt` have their own.
        gradient: `full` differentiates both predictions, `conditional` only `e_c`.
        embedded: Guidance scale that a guidance-distilled network receives as an input, such as FLUX.1 dev. By
            default the published value; without effect on other networks.
        max_norm: Largest norm of `e` of an image, as a multiple of that of `e_c`; larger ones are scaled to it. This is
            `cfg_normalization` of Z-Image in diffusers.
        interval: Part of the sampling steps with guidance: step `i` of `T`, from 0, has it if `i / T` is at least the
            first and less than the second number. The other steps use `e_c` alone, at half the cost.

    References:
        Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
        Diffusion Models", arXiv:2404.07724 (an interval of noise levels).
    """

    scale: float | None = None
    negative_prompt: str = ""
    gradient: GuidanceGradient = "full"
    embedded: float | None = None
    max_norm: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale is not None:
            at_least("guidance.scale", self.scale, 0, "write 1 for no guidance")
        if not isinstance(self.negative_prompt, str):
            raise ConfigurationError(
                f"guidance.negative_prompt={self.negative_prompt!r} must be text; write '' for none, or give each "
                f"prompt its own in the column {NEGATIVE_COLUMN!r}"
            )
        if self.embedded is not None:
            at_least("guidance.embedded", self.embedded, 0, "write 3.5, or leave it out for the published value")
        one_of("guidance.gradient", self.gradient, get_args(GuidanceGradient))
        if self.max_norm is not None:
            positive("guidance.max_norm", self.max_norm, "write 1.0, or leave it out for no limit")
        if not _is_interval(self.interval):
            shown = list(self.interval) if isinstance(self.interval, tuple) else self.interval
            raise ConfigurationError(
                f"guidance.interval={shown!r} must be two increasing numbers between 0 and 1; write [0, 0.5] for "
                "guidance in the first half of the steps"
            )

    @property
    def enabled(self) -> bool:
        """Whether the prediction for the negative prompt is computed."""
        return self.scale != 1

    def covers(self, step: int, num_steps: int) -> bool:
        """Return whether a step of a chain, numbered from 0, is in the interval."""
        return self.interval[0] <= step / num_steps < self.interval[1]

    def negative_prompt_of(self, prompt: str) -> str:
        """Return the negative prompt of a prompt: its own if it has one that is not blank, else that of the run.

        Raises:
            ConfigurationError: The value in its column `negative_prompt` is not a string.
        """
        own = metadata_of(prompt).get(NEGATIVE_COLUMN)
        if own is None:
            return self.negative_prompt
        if not isinstance(own, str):
            raise ConfigurationError(
                f"prompt {prompt!r} has {own!r} ({type(own).__name__}) in the column {NEGATIVE_COLUMN!r}; negative "
                "prompts are strings, and the cell can be empty"
            )
        return own if own.strip() else self.negative_prompt

    def or_default(self, scale: float, embedded: float | None = None) -> "Guidance":
        """Return a copy with these scales if none were given.

        Raises:
            ConfigurationError: An embedded scale is given, and the family has none.
        """
        if self.embedded is not None and embedded is None:
            raise ConfigurationError(
                f"guidance.embedded={self.embedded} has no effect on this model family, whose networks take no "
                "guidance scale as an input; leave it out"
            )
        resolved = replace(
            self,
            scale=scale if self.scale is None else self.scale,
            embedded=embedded if self.embedded is None else self.embedded,
        )
        if self.negative_prompt.strip() and not resolved.enabled:
            _warn_of_no_effect("guidance.negative_prompt")
        if self.max_norm is not None and not resolved.enabled:
            _warn_of_no_effect(f"guidance.max_norm={self.max_norm}")
        if tuple(self.interval) != (0, 1) and not resolved.enabled:
            _warn_of_no_effect(f"guidance.interval={list(self.interval)}")
        return resolved

    def check_interval(self, num_steps: int) -> None:
        """Check that the interval contains a step of a chain.

        Raises:
            ConfigurationError: It contains none, so that no step has guidance.
        """
        if self.enabled and not any(self.covers(step, num_steps) for step in range(num_steps)):
            raise ConfigurationError(
                f"guidance.interval={list(self.interval)} contains none of the {num_steps} sampling steps, at "
                f"0, {1 / num_steps:.3g} and so on, so that none has guidance; write for example [0, 0.5], or "
                "guidance.scale 1"
            )

    def check_negative_column(self, prompts: Sequence[str]) -> None:
        """Warn if prompts have a negative prompt that guidance with a scale of 1 does not use."""
        if self.enabled:
            return
        columns = prompts.column_names if isinstance(prompts, PromptTable) else {*chain(*map(metadata_of, prompts))}
        if NEGATIVE_COLUMN in columns:
            _warn_of_no_effect(f"the column {NEGATIVE_COLUMN!r}")

    def apply(self, network: Network, x: Tensor, conditioning: Conditioning, rescale: Rescale | None = None) -> Tensor:
        """Evaluate the network with guidance.

        Args:
            network: Called with latents and conditioning of the same batch size.
            x: The latents, `(B, ...)`.
            conditioning: Conditioning of `B` prompts, with that of the negative prompt as `negative`.
            rescale: Function of `e` and `e_c` that returns the rescaled `e`, of some model families.
        """
        if not self.enabled:
            return network(x, conditioning)
        assert self.scale is not None
        assert conditioning.negative is not None
        if self.gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                unconditional = network(x, conditioning.negative)
            conditional = network(x, conditioning)
        else:
            both = conditioning.negative.concatenate(conditioning)
            unconditional, conditional = network(torch.cat([x, x]), both).chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if rescale is not None:
            guided = rescale(guided, conditional)
        return guided if self.max_norm is None else _with_norm_up_to(self.max_norm, guided, conditional)


def with_token_norms(guided: Tensor, conditional: Tensor) -> Tensor:
    """Return `e |e_c| / |e|`, with the norms of single tokens, which are 2x2 squares of `(B, C, H, W)`."""
    tokens, target = pack(guided), pack(conditional)
    scaled = tokens * (target.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
    return unpack(scaled, guided.shape[-2], guided.shape[-1])


def _is_interval(value: Any) -> bool:
    """Return whether a value is two increasing numbers between 0 and 1."""
    if not isinstance(value, Sequence) or len(value) != 2 or not all(map(is_finite, value)):
        return False
    first, last = value
    return bool(0 <= first < last <= 1)


def _warn_of_no_effect(what: str) -> None:
    rank_zero_warn(f"{what} has no effect, because guidance.scale=1 is no guidance; write a larger scale, such as 5")


def _with_norm_up_to(limit: float, guided: Tensor, conditional: Tensor) -> Tensor:
    """Return `e min(1, limit |e_c| / |e|)`, with the norms of whole images."""
    norm, largest = (each.flatten(1).norm(dim=1) for each in (guided, limit * conditional))
    factor = torch.where(norm > largest, largest / norm, 1)
    return guided * factor.view(-1, *[1] * (guided.dim() - 1))
