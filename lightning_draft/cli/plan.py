"""The command `plan`: peak memory and cost of a training step, before the diffusion model's weights are loaded."""

import contextlib
import copy
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from lightning_draft.cli import shipped
from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.plan_alternatives import ALTERNATIVES, distinct, effective_options
from lightning_draft.cli.plan_report import Alternative, report
from lightning_draft.cli.process import process_arguments
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy import stochastic_steps
from lightning_draft.methods.rollout_module import RolloutModule
from lightning_draft.plan import StepPlan, call_flops, plan_step, shared_calls
from lightning_draft.weightless import without_weights

_LONG = 5
"""Number of sampling steps up to which all steps of a chain are run; with fewer than 3, the peak may be elsewhere."""

_VERIFIED = 64
"""Batch size up to which the largest batch is checked by planning a step; checking a larger one would take long."""

SHARE = 0.9
"""Fraction of a GPU's memory that a step may use; the rest is for the CUDA context and fragmentation."""


def main(args: Sequence[str]) -> int:
    """Plan one training step of a configuration and print it; return the exit status.

    Raises:
        ConfigurationError: The configuration cannot work.
    """
    options, rest = _parser().parse_known_args(args)
    memory = None if options.memory is None else parse_size(options.memory)
    flops = None if options.flops is None else _flops(options.flops)
    with shared_calls():
        _print(shipped.expand("plan", rest), memory, flops, options.brief)
    return 0


def _print(args: Sequence[str], memory: int | None, flops: float | None, brief: bool) -> None:
    run = _plan(args)
    print(report(run.title, run.plan, run.prompts, flops), flush=True)
    if not brief:
        for line in _alternatives(args, run):
            print(line, flush=True)
    if memory is not None:
        print(_largest_batch(args, run, memory), flush=True)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `12GB`, `24 GiB` or `800MB`; 1 GB is 2^30 bytes, as in the names of GPUs.

    Raises:
        ConfigurationError: It is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(f"--memory {text} is not a size; write the GPU's memory, such as 12GB")
    return int(float(match[1]) * 2 ** {"G": 30, "M": 20}[match[2].upper()])


@dataclass(frozen=True)
class _Run:
    """A planned configuration."""

    title: str
    plan: StepPlan
    prompts: int
    """Prompts of an optimizer step."""
    options: Mapping[str, str] = field(default_factory=dict)
    """From `effective_options`."""


def _plan(args: Sequence[str]) -> _Run:
    """Plan the configuration, from shorter chains if every further sampling step adds the same memory and cost."""
    with _build(args) as (cli, module, prompts):
        title, steps = _title(module, len(prompts)), module.sampler.num_steps
        size = _prompts_per_step(cli, module, len(prompts))
        options = effective_options(cli.config["fit"], module, len(prompts))
        needed = _steps_needed(module)
        if needed < steps and (shortened := _shortened(cli, module, prompts, needed)) is not None:
            return _Run(title, shortened, size, options)
        if steps <= _LONG:
            return _Run(title, _count(cli, module, prompts), size, options)
        rollouts = _rollouts_per_step(cli, module, len(prompts))
        first = max(_LONG - 2, getattr(getattr(module, "window", None), "size", 0) + 1)
        uniform = len({_steps_without_noise(module, number) for number in (*range(first, first + 3), steps)}) == 1
    plan = (_extrapolated(args, steps, first, rollouts) if uniform else None) or _with_steps(args, steps)
    return _Run(title, plan, size, options)


def _shortened(cli: Any, module: Any, prompts: list[str], needed: int) -> StepPlan | None:
    """Return the plan from a chain of `needed` steps, with calls without gradient for the others."""
    steps, module.sampler.num_steps = module.sampler.num_steps, needed
    try:
        plan = _count(cli, module, prompts)
        return plan.with_calls("denoiser", steps - needed, call_flops(module, prompts))
    except ConfigurationError:  # other options need more steps
        return None
    finally:
        module.sampler.num_steps = steps


def _steps_without_noise(module: Any, steps: int) -> int:
    """Return how many of so many sampling steps a policy without a window does not train; 0 for other methods."""
    policy = getattr(module, "policy", None)
    if policy is None or module.window is not None:
        return 0
    sampler = copy.copy(policy.sampler)
    sampler.num_steps = steps
    return steps - len(stochastic_steps(sampler, module.model.schedule))


def _rollouts_per_step(cli: Any, module: Any, batch_size: int) -> Fraction | None:
    """Return the part of a rollout, or the number of rollouts, of an optimizer step; `None` for other methods."""
    if not isinstance(module, RolloutModule):
        return None
    return Fraction(
        cli.config_init["fit"]["trainer"]["accumulate_grad_batches"] or 1, len(module.minibatches(batch_size))
    )


def _prompts_per_step(cli: Any, module: Any, batch_size: int) -> int:
    """Return the number of prompts that an optimizer step samples; at least those of one rollout."""
    rollouts = _rollouts_per_step(cli, module, batch_size)
    if rollouts is None:
        return batch_size * int(cli.config_init["fit"]["trainer"]["accumulate_grad_batches"] or 1)
    return batch_size * math.ceil(rollouts)


@contextlib.contextmanager
def _build(args: Sequence[str]) -> Iterator[tuple[Any, Any, list[str]]]:
    """Yield the command line, the method without weights, and its first batch."""
    with _quiet(), process_arguments(["fit", *args]), without_weights():
        cli = BuildCLI("fit")
        cli.datamodule.setup("fit")
        size, prompts = cli.datamodule.batch_size, list(cli.datamodule.train_prompts[: cli.datamodule.batch_size])
        yield cli, cli.model, (prompts * -(-size // len(prompts)))[:size]


def _count(cli: Any, module: Any, prompts: list[str], rollouts: Fraction | None = None) -> StepPlan:
    config = cli.config_init["fit"]["trainer"]
    names = ("precision", "accumulate_grad_batches", "gradient_clip_val")
    options = {name: config[name] for name in names if config[name] is not None}
    if rollouts is not None:
        options["accumulate_grad_batches"] = math.ceil(rollouts * len(module.minibatches(len(prompts))))
    return plan_step(module, prompts, options)


def _with_steps(args: Sequence[str], steps: int, rollouts: Fraction | None = None) -> StepPlan:
    """Plan with another number of sampling steps, and optionally as many rollouts per optimizer step."""
    with _build([*args, "--model.sampler.num_steps", str(steps)]) as built:
        return _count(*built, rollouts)


def _extrapolated(args: Sequence[str], steps: int, first: int, rollouts: Fraction | None) -> StepPlan | None:
    """Return the plan of a long chain, extrapolated from three short ones if each step adds the same.

    Args:
        args: Options of the run.
        steps: Number of sampling steps.
        first: That of the shortest chain.
        rollouts: From `_rollouts_per_step`.
    """
    try:
        short, longer, check = (_with_steps(args, number, rollouts) for number in range(first, first + 3))
    except ConfigurationError:  # other options need more steps
        return None
    expected = short.extrapolate(longer, 2)
    if (expected.live, expected.flops) != (check.live, dict(check.flops)):
        return None
    return short.extrapolate(longer, steps - first)


def _steps_needed(module: Any) -> int:
    """Return the least number of sampling steps with the same peak: those with a gradient, and one before them."""
    steps: int = module.sampler.num_steps
    if not isinstance(module, DraftModule):
        return steps
    k = module.truncation.gradient_steps(steps)
    return min(steps, k + 1) if module.truncation.gradient_steps(k + 1) == k else steps


def _title(module: Any, batch_size: int) -> str:
    model = module.model
    height, width = getattr(model, "image_size", (0, 0))
    size = f", {width}x{height}" if height else ""
    return (
        f"{type(module).__name__} with {type(module.method).__name__} on {model.source}{size}, "
        f"{type(module.sampler).__name__} with {module.sampler.num_steps} steps, batch of {batch_size}"
    )


def _alternatives(args: Sequence[str], run: _Run) -> Iterator[str]:
    """Yield a line for each option that lowers the peak."""
    found = False
    decodes = "autoencoder" in run.plan.calls
    for option in distinct([each for each in ALTERNATIVES if decodes or ".memory." not in each], run.options):
        try:
            other = _plan([*args, *option.split()])
        except ConfigurationError:
            continue
        alternative = Alternative(option, other.plan.peak, other.plan.total_flops)
        if alternative.peak < 0.99 * run.plan.peak:
            if not found:
                yield "\nOptions that lower the peak"
            found = True
            yield alternative.line(run.plan)
    if not found:
        yield "\nNo option lowers the peak by more than 1 %."


def _largest_batch(args: Sequence[str], run: _Run, memory: int) -> str:
    """Return the largest batch for a GPU, extrapolated from two batch sizes and then checked."""

    def peak(size: int) -> int:
        return _plan([*args, "--data.batch_size", str(size)]).plan.peak

    usable = SHARE * memory
    one, two = peak(1), peak(2)
    if one > usable:
        return (
            f"\nDoes not fit a GPU of {memory / 2**30:.3g} GiB, of which a tenth is left free: a batch of 1 needs "
            f"{one / 2**30:.2f} GiB."
        )
    size = max(1, math.floor(1 + (usable - one) / max(1, two - one)))
    if size > _VERIFIED:
        return (
            f"\nLargest batch for a GPU of {memory / 2**30:.3g} GiB, of which a tenth is left free: about {size}, "
            "extrapolated from batches of 1 and 2."
        )
    while (found := one if size == 1 else peak(size)) > usable:
        size = max(1, min(size - 1, math.floor(size * usable / found)))
    return (
        f"\nLargest batch for a GPU of {memory / 2**30:.3g} GiB, of which a tenth is left free: {size} "
        f"({found / 2**30:.2f} GiB)."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Omit the notices of libraries, which each planned step would repeat."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _parser() -> CommandParser:
    parser = CommandParser("lightning-draft plan")
    parser.add_argument("--memory")
    parser.add_argument("--flops")
    parser.add_argument("--brief", action="store_true")
    return parser


def _flops(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigurationError(f"--flops {text} is not a positive number; write FLOP/s such as 60e12")
    return value
