"""The page that the command `plan` prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from lightning_draft.plan import OTHER, TRAINED, StepPlan

_MIB = 2**20

_REST = "gradients, sampler and loss"
"""What a user knows the tensors of `OTHER` as, which are created outside all networks."""


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
    """Return bytes as text in KiB, MiB or GiB."""
    if count < 0.1 * _MIB:
        return f"{count / 1024:.1f} KiB"
    return f"{count / _MIB:.1f} MiB" if count < 1024 * _MIB else f"{count / _MIB / 1024:.2f} GiB"


def card(memory: int) -> str:
    """Return the memory of a GPU as text, without decimals if it is a whole number of MiB or GiB."""
    return f"{memory / _MIB:.4g} MiB" if memory < 1024 * _MIB else f"{memory / _MIB / 1024:.4g} GiB"


def report(
    title: str, plan: StepPlan, prompts: int, flops_per_second: float | None = None, uses: Fraction = Fraction(1)
) -> str:
    """Return the page that describes a plan.

    Args:
        title: Description of the configuration.
        plan: The plan.
        prompts: Number of prompts in the step.
        flops_per_second: FLOP/s of the device, from which seconds are computed; `None` omits them.
        uses: Number of optimizer steps that use the same rollout; the planned one collects it.
    """
    calls = plan.calls.get("denoiser", 0)
    cost = f"Cost of a training step  {_tera(plan.total_flops)}, "
    if uses <= 1:
        cost += f"{_tera(plan.total_flops / prompts)} per prompt"
    else:
        cost += f"with a rollout of {prompts} prompts that {uses} steps use"
    lines = [
        title,
        "",
        f"Peak memory of a training step  {size(plan.step_peak)}",
        *_rows("weights", plan.weights),
        f"  {'optimizer state':30}{size(plan.optimizer):>12}",
        *_rows("activations and gradients", plan.live_by_part, _REST),
        f"  largest: {_largest(plan)}",
        *_embedding(plan),
        "",
        cost,
        f"  calls of the denoiser, one for each batch or micro-batch, recomputed ones included: {calls}",
    ]
    if flops_per_second is not None:
        lines.append(f"  at {flops_per_second:.3g} FLOP/s: {plan.total_flops / flops_per_second:.3g} s")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP"


def _rows(title: str, sizes: Mapping[str, int], rest: str = "outside the networks") -> list[str]:
    rows = sorted(sizes.items(), key=lambda row: -row[1])
    return [
        f"  {title:30}{size(sum(sizes.values())):>12}",
        *(
            f"    {rest if name == OTHER else name:28}{size(count):>12}"
            for name, count in rows
            if count >= 0.005 * sum(sizes.values())
        ),
    ]


def _embedding(plan: StepPlan) -> list[str]:
    """Return the rows of the time before the first step, in which a model with `text.cache` embeds its prompts."""
    if plan.embedding is None:
        return []
    return [
        "",
        f"Peak memory while the prompts are embedded for text.cache, before the steps  {size(plan.embedding.peak)}",
        *_rows("weights", plan.embedding.weights),
        f"  {'activations':30}{size(plan.embedding.live):>12}",
        "",
        f"Peak memory of the run  {size(plan.peak)}, "
        + ("in a training step" if plan.step_peak >= plan.embedding.peak else "while the prompts are embedded"),
    ]


def _largest(plan: StepPlan) -> str:
    named = {f"the weights of the {name}": count for name, count in plan.weights.items()}
    named["the optimizer state"] = plan.optimizer
    named |= {f"the activations of the {name}": count for name, count in plan.live_by_part.items()}
    name = max(named, key=lambda each: named[each])
    plain = {
        f"the weights of the {TRAINED}": "the trained weights",
        f"the weights of the {OTHER}": "the weights outside the networks",
        f"the activations of the {OTHER}": _REST,
    }
    return f"{plain.get(name, name)} ({named[name] / plan.step_peak:.0%} of the peak)"
