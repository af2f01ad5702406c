"""Plans in which each kind of network call is measured once: equal to those in which every call is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.gradient_matching import AdjointMatching
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.models import Flux, LoRA, Memory
from lightning_draft.plan import StepPlan, Tracker, measure, plan_step, shared_calls, step
from lightning_draft.plan.replay import SUPPORTED, replayed
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import FlowEuler, FlowSDE
from lightning_draft.truncation import LastK
from lightning_draft.weightless import shapes_only, without_weights
from tests.tiny_families import flux


@pytest.fixture(scope="module")
def deep_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with two and four equal blocks."""
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux(folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 2, "num_single_layers": 4}))
    return folder


def planned(folder: Path, options: dict[str, Any], precision: str = "32-true") -> StepPlan:
    memory = Memory(decode_chunk=1, checkpoint_decoder=options.get("checkpointing") == "both")
    with without_weights():
        model = Flux(str(folder), lora=LoRA(2), memory=memory, height=16, width=16)
        if "truncation" in options:
            module: Any = DraftModule(model, ColorTarget(), FlowEuler(1), **options)
        else:
            module = GradientMatchingModule(model, ColorTarget(), FlowSDE(2), AdjointMatching(), **options)
        return plan_step(module, ["a cat", "a red dog"], {"precision": precision})


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"truncation": LastK(1), "checkpointing": "both", "micro_batch_size": 1}, "bf16-mixed"),
        ({}, "32-true"),
    ],
    ids=["both", "adjoint"],
)
def test_plan_of_repeated_calls_equals_that_of_run_calls(
    deep_flux: Path, options: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = planned(deep_flux, options, precision)
    monkeypatch.setattr(step, "_networks", lambda module: iter(()))
    assert repeated == planned(deep_flux, options, precision)


@pytest.mark.skipif(not SUPPORTED, reason="torch before 2.8 runs all calls")
def test_equal_blocks_are_measured_once_in_all_plans(deep_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    call = measure.Call._measure

    def noted(self: measure.Call) -> None:
        counted.append(self.part)
        call(self)

    monkeypatch.setattr(measure.Call, "_measure", noted)
    with shared_calls():
        first = planned(deep_flux, {"truncation": LastK(1), "checkpointing": "none"})
        assert counted.count("denoiser") == 4  # some inputs of the first blocks have no gradient or other strides
        number = len(counted)
        assert planned(deep_flux, {"truncation": LastK(1), "checkpointing": "none"}) == first
        assert len(counted) == number


class Twice(nn.Module):
    """Returns two parts of one tensor and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
        y = self.layer(x).square() * scale
        return (*y.chunk(2, -1), x)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_that_share_a_storage_and_returned_inputs(grad: bool, recomputed: bool) -> None:
    counts = []
    for chosen in (False, True):
        with without_weights():
            with shapes_only():
                network, x = Twice(), torch.empty(16, 4, requires_grad=True)
            tracker = Tracker({"denoiser": network})
            with tracker, replayed(tracker, [network] if chosen else []), torch.set_grad_enabled(grad):
                for _ in range(2):
                    run = (network, x, 2.0)
                    a, b, same = checkpoint(*run, use_reentrant=False) if recomputed else network(x, 2.0)
                    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata
                    held = tracker.now
                    if grad:
                        (a.exp().sum() + same.sum()).backward()
                    del a, b, same
        counts.append((held, tracker.now, tracker.peak, tracker.flops, tracker.calls))
    assert counts[0] == counts[1]
