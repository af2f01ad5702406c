"""Peak memory of a training step against the number of steps T, of steps with gradient K, and of what is recomputed.

    python -m benchmarks.memory
    python -m benchmarks.memory --model sd15 --device cuda --dtype bfloat16 --steps 50

The memory is that of one step beyond the weights: sampling with gradient, decoder, reward, backward pass. On CUDA it is
the peak of the allocator. On the CPU it is the peak size of live tensors, counted after each operation, which is exact
and reproducible but does not include the scratch space of libraries.
"""

import argparse
import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import common
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Memory, StableDiffusion
from lightning_draft.plan import Tracker
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full, LastK, Truncation

MIB = 2**20


def peak(step: Callable[[], Tensor], device: torch.device) -> float:
    """Return the peak memory of a forward and backward pass in MiB, minus the memory before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step().backward()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with Tracker() as live:
        step().backward()
    return live.peak / MIB


class Bench:
    """Measure one model with several settings."""

    def __init__(self, model: StableDiffusion, batch: int) -> None:
        self.model = model
        self.batch = batch
        model.memory = Memory(decode_chunk=1, checkpoint_decoder=True)

    def __call__(self, steps: int, truncation: Truncation, checkpointing: Checkpointing) -> float:
        """Return the peak memory of one training step in MiB."""
        module = DraftModule(
            self.model, ColorTarget(), DDIM(steps, spacing="trailing"), truncation, checkpointing=checkpointing
        )
        found = peak(lambda: module.loss_and_logs(["a cat"] * self.batch)[0], self.model.device)
        for value in module.trainable_parameters().values():
            value.grad = None
        return found

    def latents(self) -> float:
        """Return the size of a batch of float32 latents in MiB."""
        channels, height, width = self.model.latent_shape
        return self.batch * channels * height * width * 4 / MIB


def against_steps(bench: Bench, steps: int) -> str:
    """Measure full back-propagation against T: constant except for the latents if steps are recomputed."""
    rows = []
    lengths = sorted({max(2, steps // 4), max(2, steps // 2), steps, 2 * steps})
    first: dict[str, float] = {}
    for length in lengths:
        row = [str(length)]
        for mode in ("step", "none"):
            if mode == "none" and length > steps:
                row += ["-", "-"]
                continue
            measured = bench(length, Full(), mode)
            first.setdefault(mode, measured)
            more = length - lengths[0]
            expected = first[mode] + more * 3 * bench.latents() if mode == "step" else first[mode] * length / lengths[0]
            row += [f"{expected:.1f}", f"{measured:.1f}"]
        rows.append(row)
    head = ["T", "expected MiB, step", "measured MiB, step", "expected MiB, none", "measured MiB, none"]
    return (
        "Full back-propagation against T. Expected from the first line: with each step recomputed flat, up to three "
        "latents a step;\nwith nothing recomputed proportional to T.\n\n" + common.table(head, rows)
    )


def against_k(bench: Bench, steps: int) -> str:
    """Measure DRaFT-K against K: memory is proportional to K, or constant if steps are recomputed."""
    rows = []
    one = bench(steps, LastK(1), "none")
    for k in sorted({1, 2, max(1, steps // 4), max(1, steps // 2), steps}):
        kept, again = (bench(steps, LastK(k), mode) for mode in ("none", "step"))
        rows.append([str(k), f"{k * one:.1f}", f"{kept:.1f}", f"{one:.1f}", f"{again:.1f}"])
    head = ["K", "expected MiB, none", "measured MiB, none", "expected MiB, step", "measured MiB, step"]
    return (
        f"DRaFT-K against K at T = {steps}. Expected from K = 1: K times as much with nothing recomputed, as much with "
        "steps recomputed.\n\n" + common.table(head, rows)
    )


def against_modes(bench: Bench, steps: int) -> str:
    """Measure full back-propagation for each mode of recomputation."""
    expected = {"none": "1", "block": "< none", "step": "about 1/T", "both": "< step"}
    found = {mode: bench(steps, Full(), mode) for mode in expected}  # type: ignore[arg-type]
    rows = [[mode, text, f"{found[mode] / found['none']:.3f}", f"{found[mode]:.1f}"] for mode, text in expected.items()]
    head = ["checkpointing", "expected / none", "measured / none", "measured MiB"]
    return f"Full back-propagation at T = {steps} by what is recomputed.\n\n" + common.table(head, rows)


def main() -> None:
    """Run the benchmark and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=8, batch=1)
    arguments = parser.parse_args()
    common.quiet()
    model = common.open_model(arguments).to(arguments.device)
    bench = Bench(model, arguments.batch)
    parts = [part(bench, arguments.steps) for part in (against_steps, against_k, against_modes)]
    common.show("\n\n".join([common.describe(arguments, model) + ".", *parts]), arguments.output)


if __name__ == "__main__":
    main()
