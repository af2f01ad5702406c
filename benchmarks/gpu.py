"""Seconds, peak memory and share of the GPU's measured bf16 peak of training steps of denoisers of real size.

    python -m benchmarks.gpu --output gpu.md --json gpu.json
    python -m benchmarks.gpu --models sd15 sdxl --steps 20

The denoisers have the architectures of Stable Diffusion 1.5, Stable Diffusion XL and FLUX.1, random bf16 weights and
rank-8 adapters. There is no decoder and no text encoder. `plan` is the peak that `plan_step` predicts, computed in
other processes at the same time. The share is the floating-point operations of the plan, divided by the time and by the
FLOP/s of a large bf16 matrix product.

Each row is printed and written as soon as it is measured. A row that fails says why in one line, and the next row
starts. No row starts after `--minutes`, and a row that has started then stops after its current training step; compiled
cases are last, because compilation cannot be stopped.

`--device cpu --tiny` runs the same code with tiny networks.
"""

import argparse
import gc
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu_denoisers import ARCHITECTURES, TINY, Denoiser
from benchmarks.gpu_report import Report, Row
from benchmarks.step_cost import synchronize
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.quantization import Quantization
from lightning_draft.plan import StepPlan, plan_step
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.text import first_line
from lightning_draft.truncation import Full, LastK
from lightning_draft.weightless import without_weights

_WORKERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Processes that compute plans."""


@dataclass(frozen=True)
class Case:
    """A setting of the training step."""

    name: str
    k: int | None = 1
    checkpointing: str = "none"
    quantization: Quantization | None = None
    compile: bool = False

    def planned(self, denoiser: str) -> tuple[object, ...]:
        """Return what a plan depends on."""
        return denoiser, self.k, self.checkpointing, self.quantization


CASES = [
    Case("K = 1, nothing recomputed"),
    Case("K = 1, step recomputed", checkpointing="step"),
    Case("K = 1, blocks recomputed", checkpointing="block"),
    Case("K = 1, nothing recomputed, int8 base", quantization="torchao-int8"),
    Case("K = 1, nothing recomputed, nf4 base", quantization="bitsandbytes-nf4"),
    Case("K = 1, blocks recomputed, int8 base", checkpointing="block", quantization="torchao-int8"),
    Case("K = 1, blocks recomputed, nf4 base", checkpointing="block", quantization="bitsandbytes-nf4"),
    Case("full, steps recomputed", None, "step"),
    Case("full, both recomputed", None, "both"),
    Case("full, blocks recomputed", None, "block"),
    Case("full, nothing recomputed", None),
    Case("K = 1, nothing recomputed, compiled", compile=True),
]


def build(name: str, case: Case, tiny: bool, device: str, steps: int, backend: str = "inductor") -> DraftModule:
    """Build the method of a case."""
    config = (TINY if tiny else ARCHITECTURES)[name]
    model = Denoiser(name, config, device, case.quantization, backend if case.compile else None)
    sampler = FlowEuler(steps) if model.is_flux else DDIM(steps)
    truncation = Full() if case.k is None else LastK(case.k)
    return DraftModule(model, ColorTarget(), sampler, truncation, checkpointing=case.checkpointing)  # type: ignore[arg-type]


def predicted(name: str, case: Case, tiny: bool, steps: int) -> StepPlan:
    """Return the plan of a case that is not compiled."""
    common.quiet()
    with without_weights():
        return plan_step(build(name, case, tiny, "cpu", steps), ["a cat"], {})


def seconds(module: DraftModule, device: str, repeats: int, deadline: float = float("inf")) -> float:
    """Return the median seconds of a training step, after one that is not timed; one is timed after the deadline."""
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-6)
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or time.monotonic() < deadline):
        synchronize(torch.device(device))
        start = time.perf_counter()
        loss = module.loss_and_logs(["a cat"])[0]
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
    return median(times[1:])


def matmul_flops(device: str, size: int) -> float:
    """Return the FLOP/s of a bf16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        synchronize(torch.device(device))
        start = time.perf_counter()
        a @ a
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def measure(row: Row, case: Case, arguments: argparse.Namespace, deadline: float) -> None:
    """Measure a case; whatever fails, its reason is in the row and the memory is free again."""
    problem = _not_installed(case)
    if problem is None:
        try:
            _measure(row, case, arguments, deadline)
        except torch.OutOfMemoryError:
            problem = "does not fit"
        except Exception as error:  # the other rows are worth having, whatever fails here
            problem = f"failed: {type(error).__name__}: {first_line(error)}"
    row.problem = problem
    _clear(arguments.device)


def _measure(row: Row, case: Case, arguments: argparse.Namespace, deadline: float) -> None:
    device, cuda = arguments.device, torch.device(arguments.device).type == "cuda"
    module = build(row.denoiser, case, arguments.tiny, device, arguments.steps, arguments.backend)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row.seconds = seconds(module, device, arguments.repeats, deadline)
    if cuda:
        row.peak = torch.cuda.max_memory_allocated(device)


def _not_installed(case: Case) -> str | None:
    library = (case.quantization or "").partition("-")[0]
    return f"not installed: pip install {library}" if library and find_spec(library) is None else None


def _clear(device: str) -> None:
    """Free what a case leaves behind: compiled code, reference cycles, and the allocator's blocks."""
    try:
        torch.compiler.reset()
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:  # a CUDA error of the case may be reported here
        print(f"after this row: {first_line(error)}", flush=True)


def compare(row: Row, plan: Any, flops: float, timeout: float) -> None:
    """Add the plan, an `AsyncResult`, to a row."""
    try:
        found: StepPlan = plan.get(max(1.0, timeout))
    except multiprocessing.TimeoutError:
        row.problem = row.problem or "the plan took too long"
    except Exception as error:  # a row without its plan is worth having
        row.problem = row.problem or f"plan failed: {type(error).__name__}: {first_line(error)}"
    else:
        row.plan = found.peak
        row.share = None if row.seconds is None else found.total_flops / row.seconds / flops


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure all chosen cases, and return their rows."""
    deadline = time.monotonic() + 60 * arguments.minutes
    chosen = [case for case in CASES if case.name.startswith(tuple(arguments.cases) or ("",))]
    # Compiled cases are last.
    todo = [(n, case) for late in (False, True) for n in arguments.models for case in chosen if case.compile is late]
    context = multiprocessing.get_context("fork")  # before CUDA starts
    with context.Pool(_WORKERS, torch.set_num_threads, (1,)) as pool:
        plans: dict[Any, Any] = {}
        for name, case in todo:
            if case.planned(name) not in plans and arguments.plan:
                planned = replace(case, compile=False)
                plans[case.planned(name)] = pool.apply_async(
                    predicted, (name, planned, arguments.tiny, arguments.steps)
                )
        flops = matmul_flops(arguments.device, 256 if arguments.tiny else 8192)
        report = Report(_title(arguments, flops), arguments.output, arguments.json)
        report.start()
        for name, case in todo:
            row = Row(name, case.name)
            if time.monotonic() > deadline:
                row.problem = "left out after --minutes"
            else:
                measure(row, case, arguments, deadline)
                if arguments.plan:
                    compare(row, plans[case.planned(name)], flops, deadline - time.monotonic())
            report.add(row)
    return report.rows


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--cases", nargs="*", default=[], help="only those whose name starts with one of these")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps T")
    parser.add_argument("--repeats", type=int, default=3, help="timed training steps")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row starts later")
    parser.add_argument("--backend", default="inductor", help="compiler backend of the compiled cases")
    parser.add_argument("--no-plan", action="store_false", dest="plan", help="without predictions")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    parser.add_argument("--json", type=Path, help="also write the rows, in bytes and seconds, to this file")
    arguments = parser.parse_args()
    if not any(case.name.startswith(tuple(arguments.cases) or ("",)) for case in CASES):
        parser.error(f"--cases: no case starts with these; the cases are {'; '.join(case.name for case in CASES)}")
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; run it on a machine with one, or add --device cpu --tiny to try the benchmark")
    common.quiet()
    run(arguments)


def _title(arguments: argparse.Namespace, flops: float) -> str:
    cuda = torch.device(arguments.device).type == "cuda"
    device = torch.cuda.get_device_name(arguments.device) if cuda else arguments.device
    return (
        f"T = {arguments.steps}, batch 1, {device}, torch {torch.__version__}, {flops / 1e12:.3g} TFLOP/s in a bf16 "
        "matrix product."
    )


if __name__ == "__main__":
    main()
