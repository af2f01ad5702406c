"""Step time of each method compared with the time of its network calls, measured in the same run.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --model sd15 --device cuda --dtype bfloat16 --steps 50 --batch 4 --guidance-scale 7.5

The lower bound of a method is the time of its network calls: forward passes without and with a graph, and backward
passes. They are timed alone, right after each training step, as many as the step made. The step is a complete training
step of Lightning's Trainer: sampling, decoder, reward, backward pass, optimizer. The decoder and the reward are timed
too, so that the last column shows the overhead of everything else. The ratios are medians over the steps. Seconds are
CPU time of the process, with one thread (`OMP_NUM_THREADS=1`) also on a busy machine a measure of the work; on a GPU
they are elapsed time.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks import common
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import StableDiffusion
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation


@dataclass(frozen=True)
class Method:
    """A method to measure.

    Args:
        name: Name in the table.
        truncation: The truncation.
        checkpointing: The option `checkpointing`.
        forwards: Expected network passes per sample without the factor g, as a function of the number of steps; a
            backward pass counts as one.
    """

    name: str
    truncation: Truncation
    checkpointing: Checkpointing
    forwards: Callable[[int], float]


def methods(steps: int) -> list[Method]:
    """Return every truncation with its expected cost."""
    k = m = max(2, steps // 5)
    chances = sum((i + 1) / (steps + 1) for i in range(steps))
    return [
        Method("DRaFT, all activations stored", Full(), "none", lambda t: 2 * t),
        Method("DRaFT, steps checkpointed", Full(), "step", lambda t: 3 * t),
        Method("DRaFT-1", LastK(1), "none", lambda t: t + 1),
        Method(f"DRaFT-{k}", LastK(k), "none", lambda t: t + k),
        Method(f"DRaFT-{k}, steps checkpointed", LastK(k), "step", lambda t: t + 2 * k),
        Method("DRaFT-LV, n = 2", LowVariance(2), "none", lambda t: t + 1 + 2 * 2),
        Method(f"ReFL, m = {m}", ReFL(m), "none", lambda t: t - (m + 1) / 2 + 2),
        Method("AlignProp (paper), steps checkpointed", RandomK(), "step", lambda t: t + 2 * (t + 1) / 2),
        Method("AlignProp (code)", RandomSteps(), "none", lambda t: t + chances),
        Method(f"DRTune, k = {k}, m = {m}", DRTune(k, m), "none", lambda t: t - (m + 1) / 2 + 1 + k),
    ]


Kind = tuple[str, int, bool]
"""Kind of call (`without` or `with` a graph, or `again` for a recomputation), batch size, gradient of the input."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, and of its parts when called alone.

    Attributes:
        step: The whole step.
        network: All calls of the network.
        beside: Decoder and reward.
        forwards: Network passes; a backward pass counts as one.
    """

    step: float
    network: float
    beside: float
    forwards: int


@dataclass
class Clock(Callback):
    """Time training steps, and after each step the network and decoder calls that it made.

    Attributes:
        steps: The times of each step but the first.
    """

    steps: list[StepTime] = field(default_factory=list)
    _calls: Counter[Kind] = field(default_factory=Counter)
    _decoded: Counter[int] = field(default_factory=Counter)
    _recording: bool = False
    _backward: bool = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register hooks on the network and the decoder."""
        pl_module.model.unet.register_forward_pre_hook(self._record_network)
        pl_module.model.vae.decoder.register_forward_pre_hook(self._record_decoder)

    def on_before_backward(self, *_: Any) -> None:
        """Count further calls as recomputed."""
        self._backward = True

    def on_after_backward(self, *_: Any) -> None:
        """Stop counting further calls as recomputed."""
        self._backward = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._calls.clear()
        self._decoded.clear()
        self._recording = True
        self._start = seconds(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop the clock, and time the step's calls; the first step warms up."""
        step = seconds(pl_module.device) - self._start
        self._recording = False
        if trainer.global_step > 1:
            self.steps.append(self._measured(step, trainer, pl_module))

    def _record_network(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._recording:
            kind = "again" if self._backward else "with" if torch.is_grad_enabled() else "without"
            self._calls[kind, len(inputs[0]), inputs[0].requires_grad] += 1

    def _record_decoder(self, decoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._recording and not self._backward:
            self._decoded[len(inputs[0])] += 1

    def _measured(self, step: float, trainer: L.Trainer, module: DraftModule) -> StepTime:
        calls, decoded = Counter(self._calls), Counter(self._decoded)
        with trainer.precision_plugin.forward_context(), torch.enable_grad():
            network = sum(time_network(module.model, *kind) for kind in calls.elements())
            beside = sum(time_rewards(module, size) for size in decoded.elements())
        passes = sum(size * count * (2 if kind == "with" else 1) for (kind, size, _), count in calls.items())
        return StepTime(step, network, beside, passes)


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device) -> float:
    """Return the CPU seconds of this process; on a GPU the elapsed ones, when its work is done."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def time_network(model: StableDiffusion, kind: str, batch: int, attached: bool) -> float:
    """Return the seconds of one network call, including its backward pass if it has a graph (`with`).

    A recomputed call (`again`) is a forward pass with a graph; its backward pass belongs to the call it repeats.
    """
    weight = model.unet.conv_in.weight
    x = torch.randn(batch, *model.latent_shape, device=weight.device, dtype=weight.dtype, requires_grad=attached)
    text = model.encode([""]).tensors["text"].to(weight).expand(batch, -1, -1)
    start = seconds(weight.device)
    with torch.set_grad_enabled(kind != "without"):
        output = model.unet(x, 500, encoder_hidden_states=text, return_dict=False)[0]
    if kind == "with":
        targets = [value for _, value in model.trainable_parameters()] + ([x] if attached else [])
        torch.autograd.grad(output.sum(), targets)
    return seconds(weight.device) - start


def time_rewards(module: DraftModule, batch: int) -> float:
    """Return the seconds of decoding and scoring a batch of latents, including the backward pass."""
    latents = module.model.noise(batch).requires_grad_()
    start = seconds(module.device)
    rewards, _, _ = module.rewards(latents, [""] * batch)
    torch.autograd.grad(module.loss(rewards).sum(), latents)
    return seconds(module.device) - start


def measure(method: Method, model: StableDiffusion, arguments: argparse.Namespace) -> list[str]:
    """Measure a method, and return its row of the table."""
    module = DraftModule(
        model,
        ColorTarget(),
        DDIM(arguments.steps, spacing="trailing"),
        method.truncation,
        checkpointing=method.checkpointing,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
    )
    clock = Clock()
    device = torch.device(arguments.device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=arguments.precision,
        max_steps=1 + arguments.repeats,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, PromptDataModule(["a cat"] * 8, batch_size=arguments.batch, val_size=0))
    g = 1 if arguments.guidance_scale == 1 else 2
    counted, step, network, beside = (
        mean(getattr(each, name) for each in clock.steps) for name in ("forwards", "step", "network", "beside")
    )
    return [
        method.name,
        f"{method.forwards(arguments.steps) * g:.1f}",
        f"{counted / arguments.batch:.1f}",
        f"{network:.3f}",
        f"{beside:.3f}",
        f"{step:.3f}",
        f"{median(each.step / each.network for each in clock.steps):.3f}",
        f"{median(each.step / (each.network + each.beside) for each in clock.steps):.3f}",
    ]


HEAD = ["method", "expected F", "counted F", "network s", "decoder, reward s", "step s", "step / network", "step / all"]
NOTES = """\
F is one forward pass of the network for one sample; a backward pass counts as one F, and its time is measured. Expected
is the mean over the method's random choices, counted is the number in the measured steps. The target is below 1.10 for
`step / network`, or for `step / all` if the decoder is large compared with the network."""


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=10, batch=2)
    parser.add_argument("--precision", default="32-true", help="precision of the Trainer: 32-true or bf16-mixed")
    parser.add_argument("--repeats", type=int, default=4, help="number of measured steps")
    parser.add_argument("--methods", nargs="*", default=[], help="only those whose name starts with one of these")
    arguments = parser.parse_args()
    common.quiet()
    model = common.open_model(arguments)
    chosen = tuple(arguments.methods) or ("",)
    rows = [measure(m, model, arguments) for m in methods(arguments.steps) if m.name.startswith(chosen)]
    title = f"T = {arguments.steps}. {common.describe(arguments, model)}, {arguments.precision}."
    common.show(f"{title}\n\n{common.table(HEAD, rows)}\n\n{NOTES}", arguments.output)


if __name__ == "__main__":
    main()
