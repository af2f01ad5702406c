"""Compare the predicted memory of a training step with measurements.

    python -m benchmarks.plan
    python -m benchmarks.plan --model sd15 --dtype bfloat16

Each case runs in a separate process and gives the peak that `plan_step` predicts without weights, the peak of the bytes
of live tensors in the real step, and on the CPU the peak of the process's memory minus that before the model was built.
The last one includes the libraries' scratch space and the allocator's unused blocks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
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
RECOMPUTED = {"checkpoint_decoder": True, "decode_chunk": 1}
CASES: dict[str, dict[str, Any]] = {
    "K = 1, batch 1": {"k": 1, "batch": 1},
    "K = 1, batch 4": {"k": 1, "batch": 4},
    "K = 1, batch 8, guidance": {"k": 1, "batch": 8, "guidance": 5.0},
    "K = 1, step recomputed, batch 4": {"k": 1, "batch": 4, "checkpointing": "step"},
    "K = 1, step and decoder recomputed, batch 4": {"k": 1, "batch": 4, "checkpointing": "step", "memory": RECOMPUTED},
    "K = 2, batch 4": {"k": 2, "batch": 4, "checkpointing": "none"},
    "K = 2, blocks recomputed, batch 4": {"k": 2, "batch": 4, "checkpointing": "block"},
    "full, steps recomputed, batch 1": {"k": None, "batch": 1},
    "full, steps recomputed, batch 4": {"k": None, "batch": 4},
    "full, nothing recomputed, batch 2": {"k": None, "batch": 2, "checkpointing": "none"},
    "full, both recomputed, batch 4": {"k": None, "batch": 4, "checkpointing": "both", "memory": RECOMPUTED},
    "full fine-tuning, K = 1, batch 2": {"k": 1, "batch": 2, "trainable": "full"},
}
LARGE = {
    "K = 1": {"k": 1, "batch": 1},
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


def measure(folder: str, case: dict[str, Any], dtype: str, steps: int, mode: str) -> float:
    """Return the MiB of a case: `plan`, `live` or `process`."""
    prompts = ["a cat"] * case["batch"]
    if mode == "plan":
        with without_weights():
            return plan_step(build(folder, case, dtype, steps), prompts, {}).peak / MIB
    torch.set_num_threads(1)
    before = _resident()
    module = build(folder, case, dtype, steps)
    if mode == "live":
        return plan_step(module, prompts, {}).peak / MIB
    with _PeakResident() as peak:
        module.loss_and_logs(prompts)[0].backward()
    return peak.most - before


class _PeakResident:
    """Poll the process's resident memory in a thread."""

    def __enter__(self) -> "_PeakResident":
        self.most, self._running = _resident(), True
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._running = False
        self._thread.join()

    def _poll(self) -> None:
        while self._running:
            self.most = max(self.most, _resident())
            time.sleep(0.002)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=4, batch=1)
    parser.add_argument("--case", help="one case, as JSON: folder, mode and options; prints its MiB")
    arguments = parser.parse_args()
    common.quiet()
    if arguments.case is not None:
        folder, mode, case = json.loads(arguments.case)
        print(measure(folder, case, arguments.dtype, arguments.steps, mode))
        return
    with tempfile.TemporaryDirectory() as folder:
        common.write_pipeline(Path(folder), arguments.model)
        rows = [
            _row(name, [_child(arguments, folder, mode, case) for mode in ("plan", "live", "process")])
            for name, case in (LARGE if arguments.model == "sd15" else CASES).items()
        ]
    head = ["case", "plan, MiB", "live tensors, MiB", "plan / live", "process, MiB", "plan / process"]
    common.show(common.table(head, rows), arguments.output)


def _child(arguments: argparse.Namespace, folder: str, mode: str, case: dict[str, Any]) -> float:
    command = [sys.executable, "-m", "benchmarks.plan", "--case", json.dumps([folder, mode, case])]
    command += ["--dtype", arguments.dtype, "--steps", str(arguments.steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _row(name: str, found: list[float]) -> list[str]:
    plan, live, process = found
    return [name, f"{plan:.1f}", f"{live:.1f}", f"{plan / live:.3f}", f"{process:.1f}", f"{plan / process:.2f}"]


if __name__ == "__main__":
    main()
