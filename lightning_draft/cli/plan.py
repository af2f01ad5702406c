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
from functools import partial
from typing import Any

from lightning_draft.cli import shipped
from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.option_checks import MAX_BATCH
from lightning_draft.cli.plan_alternatives import ALTERNATIVES, distinct, effective_options
from lightning_draft.cli.plan_report import Alternative, card, report
from lightning_draft.cli.plan_report import size as format_size
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
    print(report(run.title, run.plan, run.prompts, flops, run.uses), flush=True)
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
    accumulate: int = 1
    """Training steps of an optimizer step."""
    rollouts: Fraction | None = None
    """From `_rollouts_per_step`."""
    uses: Fraction = Fraction(1)
    """Optimizer steps that use the same rollout."""


def _plan(args: Sequence[str], rollouts: Fraction | None = None) -> _Run:
    """Plan the configuration, from shorter chains if every further sampling step adds the same memory and cost.

    Args:
        args: Options of the run.
        rollouts: From `_rollouts_per_step`, which replaces `accumulate_grad_batches` if there are rollouts.
    """
    with _build(args) as (cli, module, prompts):
        title, steps = _title(module, len(prompts)), module.sampler.num_steps
        if rollouts is None:
            rollouts = _rollouts_per_step(cli, module, len(prompts))
        accumulate, uses = _accumulation(cli, module, len(prompts), rollouts), Fraction(1)
        if isinstance(module, RolloutModule):
            uses = Fraction(module.training_steps_per_batch(len(prompts)), accumulate)
        size = math.ceil(len(prompts) / min(Fraction(1), uses)) if rollouts is not None else len(prompts) * accumulate
        options = effective_options(cli.config["fit"], module, len(prompts))
        run = partial(_Run, title, prompts=size, options=options, accumulate=accumulate, rollouts=rollouts, uses=uses)
        needed = _steps_needed(module)
        if needed < steps and (shortened := _shortened(cli, module, prompts, needed)) is not None:
            return run(plan=shortened)
        if steps <= _LONG:
            return run(plan=_count(cli, module, prompts, rollouts))
        first = max(_LONG - 2, getattr(getattr(module, "window", None), "size", 0) + 1)
        uniform = len({_steps_without_noise(module, number) for number in (*range(first, first + 3), steps)}) == 1
    plan = (_extrapolated(args, steps, first, rollouts) if uniform else None) or _with_steps(args, steps, rollouts)
    return run(plan=plan)


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
    """Return how many times an optimizer step uses all minibatches of a rollout; `None` without rollouts."""
    if not isinstance(module, RolloutModule):
        return None
    return Fraction(_accumulation(cli, module, batch_size), len(module.minibatches(batch_size)))


def _accumulation(cli: Any, module: Any, batch_size: int, rollouts: Fraction | None = None) -> int:
    """Return the training steps of an optimizer step: as configured, or those of so many uses of a rollout.

    Optimizer steps on a part of a rollout must end with it, so that their number is rounded to a divisor.
    """
    if rollouts is None:
        return cli.config_init["fit"]["trainer"]["accumulate_grad_batches"] or 1
    number = len(module.minibatches(batch_size))
    wanted = math.ceil(rollouts * number)
    return wanted if rollouts >= 1 else next(each for each in range(wanted, number + 1) if number % each == 0)


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
        options["accumulate_grad_batches"] = _accumulation(cli, module, len(prompts), rollouts)
    return plan_step(module, prompts, options)


def _with_steps(args: Sequence[str], steps: int, rollouts: Fraction | None) -> StepPlan:
    """Plan with another number of sampling steps, and as many rollouts per optimizer step."""
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
            other = _plan([*args, *option.split()], run.rollouts)
        except ConfigurationError:
            continue
        alternative = Alternative(option + _accumulate_option(run, other), other.plan.peak, other.plan.total_flops)
        if alternative.peak < 0.99 * run.plan.peak:
            if not found:
                yield "\nOptions that lower the peak"
            found = True
            yield alternative.line(run.plan)
    if not found:
        yield "\nNo option lowers the peak by more than 1 %."


def _accumulate_option(run: _Run, other: _Run) -> str:
    """Return the option with which a changed run has as many rollouts per optimizer step as before, if it is needed."""
    same = other.rollouts is None or other.accumulate == run.accumulate
    return "" if same else f" --trainer.accumulate_grad_batches {other.accumulate}"


def _largest_batch(args: Sequence[str], run: _Run, memory: int) -> str:
    """Return the largest batch for a GPU, extrapolated from two batch sizes and then checked.

    An optimizer step has as many rollouts with each batch size, as some objectives require.
    """

    def planned(size: int) -> _Run:
        return _plan([*args, "--data.batch_size", str(size)], run.rollouts)

    gpu, usable = f"a GPU of {card(memory)}, of which a tenth is left free", SHARE * memory
    one = found = planned(1)
    if one.plan.peak > usable:
        return f"\nDoes not fit {gpu}: a batch of 1 needs {format_size(one.plan.peak)}."
    step = planned(2).plan.step_peak - one.plan.step_peak
    size = max(1, math.floor(1 + (usable - one.plan.step_peak) / max(1, step)))
    if size > MAX_BATCH:
        return f"\nLargest batch for {gpu}: more than {MAX_BATCH}, the limit of --data.batch_size."
    if size > _VERIFIED:
        return f"\nLargest batch for {gpu}: about {size}, extrapolated from batches of 1 and 2."
    while size > 1 and (found := planned(size)).plan.peak > usable:
        size = max(1, min(size - 1, math.floor(size * usable / found.plan.peak)))
    found = one if size == 1 else found
    option = _accumulate_option(run, found)
    return f"\nLargest batch for {gpu}: {size} ({format_size(found.plan.peak)}){option and f', with{option}'}."


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
