"""Compare the predicted memory of a training step with measurements.

    python -m benchmarks.plan
    python -m benchmarks.plan --model sd15 --dtype bfloat16

Each case gives the peak that `plan_step` predicts without weights, the peak of the bytes of live tensors in a training
step, and the peak of the process's memory in a training step minus that before the model was built. The last one
includes the libraries' scratch space, and not what they load once: a small or a tiny model takes a step before.

It needs Linux; each measurement runs in a forked process, in which malloc returns blocks of 64 KiB and more when they
are freed.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion
from lightning_draft.plan import plan_step
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full, LastK
from lightning_draft.weightless import without_weights

MIB = 2**20
_MMAP_THRESHOLD = -3  # of mallopt
RECOMPUTED = {"checkpoint_decoder": True, "decode_chunk": 1}
CASES: dict[str, dict[str, Any]] = {
    "K = 1, nothing recomputed, batch 1": {"k": 1, "batch": 1, "checkpointing": "none"},
    "K = 1, nothing recomputed, batch 4": {"k": 1, "batch": 4, "checkpointing": "none"},
    "K = 1, nothing recomputed, batch 8, guidance": {"k": 1, "batch": 8, "guidance": 5.0, "checkpointing": "none"},
    "K = 1 (default), batch 4": {"k": 1, "batch": 4},
    "K = 1, step and decoder recomputed, batch 4": {"k": 1, "batch": 4, "checkpointing": "step", "memory": RECOMPUTED},
    "K = 2, nothing recomputed, batch 4": {"k": 2, "batch": 4, "checkpointing": "none"},
    "K = 2, blocks recomputed, batch 4": {"k": 2, "batch": 4, "checkpointing": "block"},
    "full, steps recomputed, batch 1": {"k": None, "batch": 1},
    "full, steps recomputed, batch 4": {"k": None, "batch": 4},
    "full, nothing recomputed, batch 2": {"k": None, "batch": 2, "checkpointing": "none"},
    "full, both recomputed, batch 4": {"k": None, "batch": 4, "checkpointing": "both", "memory": RECOMPUTED},
    "full fine-tuning, K = 1, batch 2": {"k": 1, "batch": 2, "trainable": "full", "checkpointing": "none"},
}
LARGE = {
    "K = 1, nothing recomputed": {"k": 1, "batch": 1, "checkpointing": "none", "memory": {"checkpoint_decoder": False}},
    "K = 1 (default)": {"k": 1, "batch": 1},
    "full, everything recomputed": {"k": None, "batch": 1, "checkpointing": "both", "memory": RECOMPUTED},
}
"""Cases of a model of real size."""


def build(folder: str, case: dict[str, Any], dtype: str, steps: int) -> DraftModule:
    """Build the method of a case."""
    model = StableDiffusion(
        folder,
        lora=LoRA(rank=8, seed=0),
        guidance=Guidance(case.get("guidance", 1.0)),
        memory=Memory(**case.get("memory", {})),
        trainable=case.get("trainable", "lora"),
        dtype=dtype,  # type: ignore[arg-type]
    )
    truncation = Full() if case["k"] is None else LastK(case["k"])
    return DraftModule(model, ColorTarget(), DDIM(steps), truncation, checkpointing=case.get("checkpointing", "auto"))


def planned(folder: str, case: dict[str, Any], dtype: str, steps: int) -> float:
    """Return the predicted peak in MiB."""
    with without_weights():
        return _peak(build(folder, case, dtype, steps), case)


def live(folder: str, case: dict[str, Any], dtype: str, steps: int) -> float:
    """Return the peak of the bytes of live tensors of a training step, in MiB."""
    return _peak(build(folder, case, dtype, steps), case)


def process(folder: str, case: dict[str, Any], dtype: str, steps: int) -> float:
    """Return the MiB by which the process's memory grows at its peak, from before the model is built."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    _step(build(f"{folder}/warm", case, dtype, steps), case["batch"])
    gc.collect()
    libc.malloc_trim(0)
    before = _status("VmRSS")
    module = build(folder, case, dtype, steps)
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak
    _step(module, case["batch"])
    return _status("VmHWM") - before


def _step(module: DraftModule, batch: int) -> None:
    optimizer = torch.optim.AdamW(module.trainable_parameters().values())
    module.loss_and_logs(["a cat"] * batch)[0].backward()
    optimizer.step()


def _peak(module: DraftModule, case: dict[str, Any]) -> float:
    return plan_step(module, ["a cat"] * case["batch"], {}).peak / MIB


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def in_fork(function: Any, *arguments: Any) -> float:
    """Return the result of a function that runs in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        found: float = receiver.recv()
    finally:
        child.join()
    return found


def _send(sender: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=4, batch=1)
    parser.add_argument("--cases", nargs="*", default=[], help="only those whose name starts with one of these")
    arguments = parser.parse_args()
    common.quiet()
    chosen = tuple(arguments.cases) or ("",)
    cases = LARGE if arguments.model == "sd15" else CASES
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        in_fork(_write, folder, arguments.model)
        for name, case in cases.items():
            if name.startswith(chosen):
                settings = (folder, case, arguments.dtype, arguments.steps)
                rows.append(_row(name, *(in_fork(each, *settings) for each in (planned, live, process))))
                print(*rows[-1], flush=True)
    head = ["case", "plan, MiB", "live tensors, MiB", "plan / live", "process, MiB", "plan / process"]
    common.show(common.table(head, rows), arguments.output)


def _write(folder: str, model: str) -> None:
    common.write_pipeline(Path(folder), model)
    common.write_pipeline(Path(folder) / "warm", "small" if model == "small" else "tiny")


def _row(name: str, plan: float, live: float, process: float) -> list[str]:
    return [name, f"{plan:.1f}", f"{live:.1f}", f"{plan / live:.3f}", f"{process:.1f}", f"{plan / process:.2f}"]


if __name__ == "__main__":
    main()
