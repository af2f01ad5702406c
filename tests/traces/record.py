"""Train a case and record its trace, without the package's own callbacks."""

import hashlib
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Trace = dict[str, Any]
"""Lists of one value a batch (`loss`, `reward`, `grad_norm`, `update_norm`, `params_sha256`), and plain values."""


@dataclass(frozen=True)
class Case:
    """A training run of a few steps.

    Args:
        module: Builds the LightningModule from the folder of the pipelines.
        data: Builds its data module.
        steps: Optimizer steps.
        callbacks: Builds further callbacks.
        trainer: Options of the Trainer.
        resume_after: Save a checkpoint after this batch and record the resumed run too, as `resumed`.
        strategy: Builds the strategy of a run on two processes; by default there is one process.
    """

    module: Callable[[Path], L.LightningModule]
    data: Callable[[], L.LightningDataModule]
    steps: int = 3
    callbacks: Callable[[], list[L.Callback]] = list
    trainer: Mapping[str, Any] = field(default_factory=dict)
    resume_after: int | None = None
    strategy: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Package:
    """Functions and names of the package that the tool uses.

    Args:
        metrics: Logged metrics by their names in the trace.
        trainable: The optimized parameters of a module.
        denoiser: The network whose calls are counted.
        exported: The LoRA files below a run's folder.
    """

    metrics: Mapping[str, str]
    trainable: Callable[[Any], Mapping[str, Tensor]]
    denoiser: Callable[[Any], nn.Module]
    exported: Callable[[Path], Sequence[Path]]


def whole(value: Tensor) -> Tensor:
    """Return the full tensor, gathered from all processes and detached."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def digest(tensors: Sequence[Tensor]) -> str:
    """Return the SHA-256 of tensors, independent of their names and order."""
    each = sorted(hashlib.sha256(f"{tuple(t.shape)}".encode() + _bytes(t)).hexdigest() for t in tensors)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm in float64, independent of the order of the tensors."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))


class Recorder(L.Callback):
    """Measures every batch.

    Args:
        package: Functions and names of the package.
        checkpoint: Where to save a checkpoint after batch `save_after`.
        save_after: Number of the batch, from 1.
    """

    def __init__(self, package: Package, checkpoint: Path | None = None, save_after: int | None = None) -> None:
        self.package = package
        self.checkpoint = checkpoint
        self.save_after = save_after
        self.trace: Trace = {}
        self.calls = [0, 0]
        self._initial: dict[str, Tensor] = {}
        self._norm = 0.0
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the initial state, and start counting the network's calls."""
        self._initial = self._values(pl_module)
        network = self.package.denoiser(pl_module)
        self.trace["network_sha256"] = digest([whole(value) for value in network.parameters()])
        network.register_forward_pre_hook(self._count)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the gradient accumulated so far, before it is clipped."""
        values = self.package.trainable(pl_module).values()
        self._norm = norm([whole(value.grad) for value in values if value.grad is not None])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Record the batch."""
        values = self._values(pl_module)
        row = {
            "loss": float(outputs["loss"]),
            "grad_norm": self._norm,
            "update_norm": norm([value - self._initial[name] for name, value in values.items()]),
            "params_sha256": digest(list(values.values())),
        }
        logged = {name: trainer.callback_metrics.get(metric) for name, metric in self.package.metrics.items()}
        row |= {name: float(value) for name, value in logged.items() if value is not None}
        for name, value in row.items():
            self.trace.setdefault(name, []).append(value)
        self._batches += 1
        if self._batches == self.save_after:
            trainer.save_checkpoint(self.checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum the calls."""
        self.trace["network_forwards"], self.trace["network_forwards_with_grad"] = self.calls

    def _values(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: whole(value).cpu().clone() for name, value in self.package.trainable(module).items()}

    def _count(self, *_: Any) -> None:
        self.calls[0] += 1
        self.calls[1] += torch.is_grad_enabled()


def record(case: Case, package: Package, pipelines: Path, folder: Path) -> Trace:
    """Train a case and return its trace.

    Args:
        case: The case.
        package: What is known of the package.
        pipelines: Folder of the pipelines.
        folder: An empty one for the run.
    """
    if case.strategy is not None:
        return _in_two_processes(lambda: _run(case, package, pipelines, folder))
    if case.resume_after is None:
        return _run(case, package, pipelines, folder)
    checkpoint = folder / "middle.ckpt"
    trace = _run(case, package, pipelines, folder / "whole", save=checkpoint)
    return {**trace, "resumed": _run(case, package, pipelines, folder / "resumed", resume=checkpoint)}


def _run(
    case: Case, package: Package, pipelines: Path, folder: Path, save: Path | None = None, resume: Path | None = None
) -> Trace:
    torch.manual_seed(0)
    recorder = Recorder(package, save, None if save is None else case.resume_after)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1 if case.strategy is None else 2,
        "strategy": "auto" if case.strategy is None else case.strategy(),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "max_steps": case.steps,
    }
    # The recorder is last: validation after a batch belongs to the next row.
    trainer = L.Trainer(callbacks=[*case.callbacks(), recorder], **{**defaults, **case.trainer})
    trainer.fit(case.module(pipelines), case.data(), ckpt_path=resume, weights_only=False)
    files = {file.stem: load_file(file) for file in package.exported(folder)}
    for stem, tensors in files.items():
        recorder.trace[f"lora_{stem}_sha256"] = _named_digest(tensors)
    final = {name: trainer.callback_metrics.get(package.metrics[name]) for name in ("val_reward", "val_gain")}
    recorder.trace |= {f"final_{name}": float(value) for name, value in final.items() if value is not None}
    return recorder.trace


def _named_digest(tensors: Mapping[str, Tensor]) -> str:
    parts = (
        name.encode() + str(tuple(tensors[name].shape)).encode() + _bytes(tensors[name]) for name in sorted(tensors)
    )
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _in_two_processes(work: Callable[[], Trace]) -> Trace:
    """Run `work` on two processes as torchrun starts them, and return the trace of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def process(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "traces"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
        trace = work()
        if rank == 0:
            sender.send(trace)

    processes = [context.Process(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for each in processes:
        each.start()
    try:
        if not receiver.poll(120):
            raise RuntimeError("a run on two processes did not end; its error is printed above")
        return receiver.recv()
    finally:
        for each in processes:
            each.join(10)
            each.kill()
