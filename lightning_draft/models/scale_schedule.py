"""The scale of the adapters as a function of the sampling step.

References:
    "DRaFT+" in NVIDIA's NeMo-Aligner (annealed guidance between the base model and the fine-tuned one).
    Sorokin et al., "ImageReFL", arXiv:2505.22569 (combined generation: the base model first, then the fine-tuned one).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from lightning_draft.arguments import at_least, finite, in_range, one_of
from lightning_draft.errors import ConfigurationError

SCHEDULE = "scale_schedule"
"""Key of the schedule in the header of a LoRA file."""

Interpolation = Literal["weights", "predictions"]


@dataclass(frozen=True)
class ScaleSchedule:
    """Scale of the adapters at step `i` of `T`, from `i = 0`, the noisiest step: `w_i`, times that of the model.

        w_i = (i / T)^power if i / T >= start, else 0;   or w_i = scales[floor(i len(scales) / T)]

    With `interpolate: weights` the weights of a step are `theta_0 + w_i dW`, at no further cost. With `predictions` the
    prediction of a step is `(1 - w_i) eps_base + w_i eps_tuned`, which needs a network call for each of the two; for
    `w_i` of 0 and 1 both are the same. The base model does not change. Updates of text encoders are not scheduled,
    because prompts are embedded once.

    Args:
        power: Exponent, at least 0; `power=0, start=0.6` uses the base model for the first 60 % of the steps.
        start: Fraction of the steps before which `w_i` is 0, in [0, 1).
        scales: `w_i` for each step, or for equal parts of the chain, instead of `power` and `start`.
        interpolate: What is interpolated, `weights` or `predictions`.

    Raises:
        ConfigurationError: An option is out of range, or `scales` is given with `power` or `start`.

    References:
        NeMo-Aligner (DRaFT+): `power=1` (linear), `power=2`, `power=4`, or `power=0, start=0.6` with predictions.
        ImageReFL, arXiv:2505.22569: `power=0`, with `start` the fraction of steps of the base model.
    """

    power: float = 1.0
    start: float = 0.0
    scales: Sequence[float] | None = None
    interpolate: Interpolation = "weights"

    def __post_init__(self) -> None:
        finite("scale_schedule.power", at_least("scale_schedule.power", self.power, 0))
        in_range("scale_schedule.start", self.start, 0, 1, "write for example 0.6")
        if self.start == 1:
            raise ConfigurationError("scale_schedule.start=1 never uses the adapters; write for example 0.6")
        one_of("scale_schedule.interpolate", self.interpolate, get_args(Interpolation))
        if self.scales is None:
            return
        if isinstance(self.scales, str) or not self.scales:
            raise ConfigurationError(f"scale_schedule.scales={self.scales!r} must be a list such as [0, 0.5, 1]")
        object.__setattr__(self, "scales", tuple(finite("scale_schedule.scales", scale) for scale in self.scales))
        if (self.power, self.start) != (1.0, 0.0):
            raise ConfigurationError("scale_schedule.scales replaces power and start; leave these out")

    @property
    def scales_weights(self) -> bool:
        """Whether adapters with the scale `w_i` give the prediction of each step, without the base model's."""
        only_0_and_1 = self.power == 0 if self.scales is None else set(self.scales) <= {0.0, 1.0}
        return self.interpolate == "weights" or only_0_and_1

    def weight(self, step: int, num_steps: int) -> float:
        """Return `w_i` of step `step` of `num_steps`."""
        if self.scales is not None:
            return float(self.scales[step * len(self.scales) // num_steps])
        fraction = step / num_steps
        return float(fraction**self.power) if fraction >= self.start else 0.0

    @property
    def is_constant(self) -> bool:
        """Whether the scale is 1 at each step, as without a schedule."""
        return (self.power, self.start) == (0, 0) if self.scales is None else set(self.scales) == {1}

    def to_text(self) -> str:
        """Return the schedule as JSON, for the header of a LoRA file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "ScaleSchedule":
        """Return the schedule of a text.

        Args:
            text: The result of `to_text`, or `linear`, `power_P`, `step_S` (as NeMo-Aligner names them), or numbers
                such as `0,0.5,1`.

        Raises:
            ConfigurationError: The text is none of these, or a number is out of range.
        """
        kind, _, number = text.partition("_")
        try:
            if text.startswith("{"):
                return cls(**json.loads(text))
            if text == "linear":
                return cls()
            if kind == "power":
                return cls(power=_number(number))
            if kind == "step":
                return cls(power=0.0, start=_number(number))
            return cls(scales=[_number(part) for part in text.split(",")])
        except ConfigurationError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{text[:80]!r} is not a scale schedule; write linear, power_2, step_0.6, or scales such as 0,0.5,1"
            ) from error


def header_of(schedule: ScaleSchedule | None) -> dict[str, str]:
    """Return the entry of a schedule in the header of a LoRA file; nothing without one."""
    return {} if schedule is None else {SCHEDULE: schedule.to_text()}


def schedule_of(metadata: Mapping[str, str]) -> ScaleSchedule | None:
    """Return the schedule in the header of a LoRA file; None without one, or if the scale is 1 at each step.

    Raises:
        ConfigurationError: It is not valid.
    """
    schedule = ScaleSchedule.from_text(metadata[SCHEDULE]) if SCHEDULE in metadata else None
    return None if schedule is None or schedule.is_constant else schedule


def _number(text: str) -> float:
    if "_" in text:  # Python would read 1_0 as 10
        raise ValueError(f"{text!r} is not a number")
    return float(text)
