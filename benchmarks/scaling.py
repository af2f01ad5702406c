"""Strong and weak scaling over processes, and the bytes that a training step sends compared with the least possible.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --device cuda --model sd15 --dtype bfloat16 --processes 1 2 4 8 --steps 20
    python -m benchmarks.scaling --plan

The strong efficiency of n processes is `t_1 / (n t_n)` with the same batch in total, the weak efficiency `t_1 / t_n`
with the same batch per process. Both are given for wall-clock time, and for the CPU time of a process, which depends
less on other programs on the same cores. Bytes are those that a process sends with ring algorithms, computed from the
tensors of every collective of a training step. The least possible is `2 (n - 1) / n` times the gradients for DDP; for
FSDP2 `(n - 1) / n` times the weights for each network pass, and `(n - 1) / n` times the gradients: three for full
fine-tuning of one network call, which are two gathers and one scatter.

`--plan` prints the bytes that a step of denoisers of real size sends on 8 and 64 GPUs, and the time that they take.
Communication and computation are added, as if they did not overlap.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

RINGS = {"allreduce": 2, "allgather": 1, "reducescatter": 1, "broadcast": 1}
"""How often a process sends `(n - 1) / n` of the larger of input and output, by the kind of collective."""


@dataclass(frozen=True)
class Case:
    """A setting of the training step.

    Args:
        name: Name in the table.
        fsdp: Whether the denoiser is sharded with FSDP2; otherwise DDP is used.
        full: Whether all weights are trained instead of adapters.
        checkpointing: The option `checkpointing`.
    """

    name: str
    fsdp: bool
    full: bool
    checkpointing: Checkpointing = "none"

    def least(self, processes: int, weights: float, trained: float, passes: int) -> float:
        """Return the least number of bytes that a process sends in a step.

        Args:
            processes: Number of processes.
            weights: Bytes of the denoiser.
            trained: Bytes of the gradients.
            passes: Number of network passes, forward and backward; a backward pass can recompute without a gather.
        """
        share = (processes - 1) / processes
        return share * (passes * weights + trained) if self.fsdp else 2 * share * trained


CASES = [
    Case("LoRA, DDP", fsdp=False, full=False),
    Case("full fine-tuning, DDP", fsdp=False, full=True),
    Case("LoRA, FSDP2", fsdp=True, full=False),
    Case("full fine-tuning, FSDP2", fsdp=True, full=True),
    Case("full fine-tuning, FSDP2, steps recomputed", fsdp=True, full=True, checkpointing="step"),
]


class Collectives(TorchDispatchMode):
    """Within this context, add up the bytes that this process sends, by the kind of collective.

    Args:
        processes: Number of processes.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record it if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the collectives of its local tensors
        result = func(*args, **(kwargs or {}))
        namespace, name = str(func).split(".")[:2]
        kind = next((kind for kind in RINGS if kind in name.replace("_", "")), None)
        if namespace in ("c10d", "_c10d_functional") and kind is not None:
            payload = max(size(each) for each in (*args[:2], result))
            self.sent[kind] += RINGS[kind] * (self.processes - 1) / self.processes * payload
        return result


def size(tensors: Any) -> int:
    """Return the bytes of all tensors in a nested structure."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


@dataclass
class Meter(Callback):
    """Count the collectives and network passes of the second step, and time the later ones."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    forwards: int = 0
    mode: Collectives | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count the calls of the network."""
        pl_module.model.denoiser.register_forward_pre_hook(self._count)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start to count or to time."""
        if trainer.global_step == 1:
            self.forwards, self.mode = 0, Collectives(trainer.world_size)
            self.mode.__enter__()
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop to count or to time."""
        if trainer.global_step == 2:
            assert self.mode is not None
            self.mode.__exit__(None, None, None)
            self._counted = self.forwards
        elif trainer.global_step > 2:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.wall.append(time.perf_counter() - self._start[0])
            self.cpu.append(time.process_time() - self._start[1])

    def results(self, module: DraftModule) -> dict[str, Any]:
        """Return the measured values, to be stored as JSON."""
        assert self.mode is not None
        parameters = list(module.model.denoiser.parameters())
        return {
            "wall": median(self.wall),
            "cpu": median(self.cpu),
            "sent": dict(self.mode.sent),
            "passes": self._counted + 1,
            "weights": size(parameters),
            "trained": size([value for value in parameters if value.requires_grad]),
        }

    def _count(self, *_: Any) -> None:
        self.forwards += torch._C._current_graph_task_id() == -1  # not if the backward pass recomputes


def train(rank: int, case: Case, batch: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Train in one of the processes, and write the measured values to `folder/RANK.json`."""
    common.quiet()
    guidance, lora = Guidance(arguments.guidance_scale), None if case.full else LoRA(rank=8, seed=0)
    model = StableDiffusion(
        str(folder / "model") if arguments.model in common.SIZES else arguments.model,
        trainable="full" if case.full else "lora",
        lora=lora,
        guidance=guidance,
        dtype=arguments.dtype,
    )
    module = DraftModule(
        model,
        ColorTarget(),
        DDIM(arguments.steps, spacing="trailing"),
        LastK(1),
        checkpointing=case.checkpointing,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
    )
    world = int(os.environ["WORLD_SIZE"])
    sharded = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False) if case.fsdp and world > 1 else "ddp"
    meter = Meter()
    trainer = L.Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=world,
        strategy="auto" if world == 1 else sharded,
        max_steps=2 + arguments.repeats,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module.checks_first_step = False
    trainer.fit(module, PromptDataModule(["a cat"] * 8 * batch * world, batch_size=batch, val_size=0))
    (folder / f"{rank}.json").write_text(json.dumps(meter.results(module)))


def run(case: Case, processes: int, batch: int, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train with a batch per process in new processes; return the measured values of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "scaling"}

    def process(rank: int) -> None:
        """Train as one of the processes, and end without cleaning up."""
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in {**place, **ranks}.items()})
        train(rank, case, batch, arguments, folder)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(rank,)) for rank in range(processes)]
    for each in started:
        each.start()
    for each in started:
        each.join()
    if any(each.exitcode for each in started):
        raise RuntimeError(f"{case.name} with {processes} processes failed; its output is above")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def rows(case: Case, arguments: argparse.Namespace, folder: Path) -> Iterable[list[str]]:
    """Measure a case with each number of processes, and yield the rows of the table."""
    (alone,) = run(case, 1, arguments.batch, arguments, folder)
    for processes in (count for count in arguments.processes if count > 1):
        strong, weak = (
            run(case, processes, batch, arguments, folder) for batch in (arguments.batch // processes, arguments.batch)
        )
        cells = [case.name, str(processes)]
        for kind in ("wall", "cpu"):
            slow_strong, slow_weak = (max(each[kind] for each in found) for found in (strong, weak))
            cells += [f"{alone[kind] / processes / slow_strong:.2f}", f"{alone[kind] / slow_weak:.2f}"]
        first = weak[0]
        sent = sum(first["sent"].values())
        least = case.least(processes, alone["weights"], alone["trained"], first["passes"])
        yield [*cells, str(first["passes"]), f"{sent / 1e6:.3f}", f"{least / 1e6:.3f}", f"{sent / least:.3f}"]


def planned(links: dict[int, float], flops: float, steps: int, batch: int) -> Iterable[list[str]]:
    """Yield the rows of the plan for denoisers of real size: bf16 weights with LoRA, float32 weights otherwise.

    Args:
        links: Bytes per second that a GPU sends, by the number of GPUs.
        flops: FLOP/s of a GPU in training.
        steps: Number of sampling steps.
        batch: Batch per GPU.
    """
    for (name, (weights, adapters, forward)), case in itertools.product(DENOISERS.items(), CASES[:4]):
        compute = (steps + (2 if case.full else 1)) * batch * forward / flops
        stored, trained = (4 * weights, 4 * weights) if case.full else (2 * weights, 4 * adapters)
        cells = [name, case.name]
        for processes, link in links.items():
            sent = case.least(processes, stored, trained, steps + 1)
            cells += [f"{sent / 1e9:.3g}", f"{sent / link:.2g}", f"{compute / (compute + sent / link):.2f}"]
        yield [*cells[:2], f"{compute:.2f}", *cells[2:]]


HEAD = [
    "case",
    "processes",
    "strong, wall",
    "weak, wall",
    "strong, CPU",
    "weak, CPU",
    "passes",
    "sent, MB",
    "least, MB",
]
PLAN = ["denoiser", "case", "compute, s"] + [f"{n} GPUs: {what}" for n in (8, 64) for what in ("GB", "s", "efficiency")]
DENOISERS = {
    "SD 1.5, 512x512": (859_520_964, 1_594_368, 0.68e12),
    "SDXL, 1024x1024": (2_567_463_684, 11_612_160, 6.0e12),
    "FLUX.1, 1024x1024": (11_901_408_320, 9_338_880, 59.6e12),
}
"""Parameters, those of rank-8 adapters, and FLOPs of a forward pass, counted from `benchmarks.gpu.ARCHITECTURES`."""


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=4, batch=2)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps")
    parser.add_argument("--cases", nargs="*", default=[], help="only those whose name starts with one of these")
    parser.add_argument("--plan", action="store_true", help="print the plan for 8 and 64 GPUs instead of measuring")
    parser.add_argument(
        "--links", type=float, nargs=2, default=[300.0, 50.0], help="for the plan: GB/s of 8 and 64 GPUs"
    )
    parser.add_argument("--tflops", type=float, default=300.0, help="for the plan: TFLOP/s of a GPU in training")
    arguments = parser.parse_args()
    common.quiet()
    if arguments.plan:
        rates = dict(zip((8, 64), (1e9 * link for link in arguments.links), strict=True)), arguments.tflops * 1e12
        title = f"T = {arguments.steps}, K = 1, batch {arguments.batch} per GPU"
        title += f", {arguments.links[0]:g} and {arguments.links[1]:g} GB/s, {arguments.tflops:g} TFLOP/s."
        common.show(
            f"{title}\n\n{common.table(PLAN, list(planned(*rates, arguments.steps, arguments.batch)))}",
            arguments.output,
        )
        return
    torch.set_num_threads(1)  # before the first operation: threads do not survive the fork
    chosen = tuple(arguments.cases) or ("",)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in common.SIZES:
            common.write_pipeline(Path(folder) / "model", arguments.model)
        cases = [case for case in CASES if case.name.startswith(chosen)]
        found = [row for case in cases for row in rows(case, arguments, Path(folder))]
    title = f"{arguments.model}, T = {arguments.steps}, K = 1, batch {arguments.batch}, {arguments.dtype}"
    common.show(f"{title}, {arguments.device}.\n\n{common.table([*HEAD, 'sent / minimum'], found)}", arguments.output)


if __name__ == "__main__":
    main()
