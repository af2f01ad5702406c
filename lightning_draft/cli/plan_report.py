"""The page that the command `plan` prints."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_draft.plan import StepPlan

_MIB = 2**20


@dataclass(frozen=True)
class Alternative:
    """Peak and cost of the step with one option changed.

    Args:
        option: The option as written on the command line.
        peak: Peak memory in bytes.
        flops: Floating-point operations of the step.
    """

    option: str
    peak: int
    flops: int

    def line(self, plan: StepPlan) -> str:
        """Return one line that compares the alternative with a plan."""
        memory, cost = self.peak / plan.peak - 1, self.flops / plan.total_flops - 1
        return f"  {size(self.peak):>11}  {memory:+5.0%} memory  {cost:+5.0%} FLOPs   {self.option}"


def size(count: float) -> str:
    """Return bytes as text in MiB or GiB."""
    return f"{count / _MIB:.1f} MiB" if count < 1024 * _MIB else f"{count / _MIB / 1024:.2f} GiB"


def report(title: str, plan: StepPlan, prompts: int, flops_per_second: float | None = None) -> str:
    """Return the page that describes a plan.

    Args:
        title: Description of the configuration.
        plan: The plan.
        prompts: Number of prompts in the step.
        flops_per_second: FLOP/s of the device, from which seconds are computed; `None` omits them.
    """
    calls = plan.calls.get("denoiser", 0)
    lines = [
        title,
        "",
        f"Peak memory of a training step  {size(plan.peak)}",
        *_rows("weights", plan.weights),
        f"  {'optimizer state':30}{size(plan.optimizer):>12}",
        *_rows("activations and gradients", plan.live_by_part),
        f"  largest: {_largest(plan)}",
        "",
        f"Cost of a training step  {_tera(plan.total_flops)}, {_tera(plan.total_flops / prompts)} per prompt",
        f"  calls of the denoiser with the whole batch, recomputed ones included: {calls}",
    ]
    if flops_per_second is not None:
        lines.append(f"  at {flops_per_second:.3g} FLOP/s: {plan.total_flops / flops_per_second:.3g} s")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP"


def _rows(title: str, sizes: Mapping[str, int]) -> list[str]:
    rows = sorted(sizes.items(), key=lambda row: -row[1])
    return [
        f"  {title:30}{size(sum(sizes.values())):>12}",
        *(f"    {name:28}{size(count):>12}" for name, count in rows if count >= 0.005 * sum(sizes.values())),
    ]


def _largest(plan: StepPlan) -> str:
    named = {f"the weights of the {name}": count for name, count in plan.weights.items()}
    named |= {f"the activations of the {name}": count for name, count in plan.live_by_part.items()}
    name = max(named, key=lambda each: named[each])
    return f"{name} ({named[name] / plan.peak:.0%} of the peak)"
