"""The benchmarks with a small pipeline: the cost table, and memory that does not grow with T."""

import argparse
import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, fast, gpu, memory, scaling, step_cost
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full, LastK

STEPS = 6


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_network_calls_of_every_method_equal_the_cost_table(tiny_sd: Path, guidance_scale: float) -> None:
    """With guidance both branches are one batch, so there are as many calls of twice the size."""
    model = StableDiffusion(str(tiny_sd), guidance=Guidance(guidance_scale))
    arguments = argparse.Namespace(
        device="cpu", precision="32-true", repeats=1, batch=1, steps=STEPS, guidance_scale=guidance_scale
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = step_cost.methods(STEPS)
    if guidance_scale != 1:
        chosen = [method for method in chosen if method.name in ("DRaFT-1", "DRaFT-LV, n = 2")]
    for method in chosen:
        name, expected, counted, *_ = step_cost.measure(method, model, arguments)
        least, most = {
            "ReFL": (STEPS, STEPS + 1),
            "AlignProp (paper)": (STEPS + 2, 3 * STEPS),
            "AlignProp (code)": (STEPS + 1, 2 * STEPS),
            "DRTune": (STEPS + 1, STEPS + 2),
        }.get(name.split(",")[0], (float(expected), float(expected)))
        assert least <= float(counted) <= most, name
        assert least <= float(expected) <= most, name


def test_memory_of_full_back_propagation_does_not_grow_with_the_steps(tiny_sd: Path) -> None:
    bench = memory.Bench(StableDiffusion(str(tiny_sd), guidance=Guidance(1.0)), batch=1)
    short, long = (bench(steps, Full(), "step") for steps in (3, 6))
    assert long - short < 3 * 3 * bench.latents()
    assert bench(4, Full(), "none") > 1.7 * bench(2, Full(), "none")
    assert bench(6, LastK(1), "none") == pytest.approx(bench(2, LastK(1), "none"), rel=0.02)
    assert bench(3, Full(), "both") < short


def test_tables_are_markdown() -> None:
    page = common.table(["name", "n"], [["a", "1"], ["long", "22"]])
    assert page.splitlines() == ["| name |  n |", "| ---- | -: |", "| a    |  1 |", "| long | 22 |"]


@pytest.fixture
def run_gpu_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs the benchmark with tiny networks and returns the rows of its JSON file."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        common_ones = ["--device", "cpu", "--tiny", "--steps", "1", "--repeats", "1", "--backend", "eager"]
        files = ["--json", str(tmp_path / "gpu.json"), "--output", str(tmp_path / "gpu.md")]
        monkeypatch.setattr("sys.argv", ["gpu", *common_ones, *files, *arguments])
        gpu.main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        assert len((tmp_path / "gpu.md").read_text().splitlines()) == 4 + len(rows)
        return rows

    return run


@pytest.mark.parametrize("arguments", [["sdxl", "--cases", "K = 1, blocks"], ["flux"]], ids=lambda each: each[0])
def test_the_gpu_benchmark_measures_every_case(run_gpu_benchmark: Any, arguments: list[str]) -> None:
    rows = run_gpu_benchmark("--no-plan", "--models", *arguments)
    assert len(rows) == (len(gpu.CASES) if arguments == ["flux"] else 3)
    for row in rows:
        if "int8 base" in row["case"] and find_spec("torchao") is None:
            assert row["problem"] == "not installed: pip install torchao"
        elif "nf4 base" in row["case"] and find_spec("bitsandbytes") is None:
            assert row["problem"] == "not installed: pip install bitsandbytes"
        else:
            assert row["problem"] is None, row
            assert row["seconds"] > 0


def test_the_gpu_benchmark_compares_with_the_plan(run_gpu_benchmark: Any) -> None:
    plain, nf4 = run_gpu_benchmark("--models", "flux", "--cases", "K = 1, step", "K = 1, nothing recomputed, nf4")
    assert plain["problem"] is None
    assert plain["share"] > 0
    assert 0 < nf4["plan"] < plain["plan"]


def no_plan(*_: Any) -> None:
    raise ValueError("no plan")


def test_the_gpu_benchmark_goes_on_after_a_row_that_fails(
    run_gpu_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row fails, and so does the plan of both."""
    build, built = gpu.build, []

    def failing(*arguments: Any) -> Any:
        built.append(arguments)
        if len(built) == 1:
            raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore lines")
        return build(*arguments)

    monkeypatch.setattr(gpu, "build", failing)
    monkeypatch.setattr(gpu, "predicted", no_plan)
    first, second = run_gpu_benchmark("--models", "sd15", "flux", "--cases", "K = 1, step")
    assert first["problem"] == "failed: RuntimeError: CUDA error: an illegal instruction was encountered"
    assert first["seconds"] is None
    assert second["problem"] == "plan failed: ValueError: no plan"
    assert second["seconds"] > 0


def test_the_gpu_benchmark_starts_no_row_after_its_minutes(run_gpu_benchmark: Any) -> None:
    (row,) = run_gpu_benchmark("--models", "sd15", "--cases", "K = 1, step", "--minutes", "0")
    assert row["problem"] == "left out after --minutes"


def test_a_row_of_the_gpu_benchmark_stops_after_the_deadline() -> None:
    module, calls = gpu.build("sd15", gpu.CASES[0], True, "cpu", 1), []
    module.model.register_forward_hook(lambda *_: calls.append(1))
    assert gpu.seconds(module, "cpu", 50, deadline=0) > 0
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "sd3"], "invalid choice: 'sd3' (choose from"),
        (["--cases", "K = 7"], "no case starts with these; the cases are K = 1, nothing recomputed"),
    ],
)
def test_the_gpu_benchmark_lists_what_it_knows(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err


def test_the_gpu_benchmark_without_a_gpu_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU was found; run it on a machine with one" in capsys.readouterr().err


def test_sharded_training_sends_one_gather_for_each_network_pass_and_one_scatter(tmp_path: Path) -> None:
    """Counted from the collectives of a step with full fine-tuning on two processes; other messages are small."""
    common.write_pipeline(tmp_path / "model", "tiny")
    arguments = argparse.Namespace(
        model="tiny", guidance_scale=1.0, dtype="float32", steps=3, repeats=1, device="cpu", batch=1
    )
    case = next(case for case in scaling.CASES if case.fsdp and case.full)
    for found in scaling.run(case, 2, 1, arguments, tmp_path):
        assert found["passes"] == 3 + 1
        assert found["sent"]["allgather"] == pytest.approx(found["weights"] / 2 * 4, rel=0.01)
        assert found["sent"]["reducescatter"] == pytest.approx(found["trained"] / 2, rel=0.01)
        least = case.least(2, found["weights"], found["trained"], found["passes"])
        assert least <= sum(found["sent"].values()) < 1.02 * least


def test_the_compared_step_of_trl_has_the_loss_and_gradient_of_draft_1(tiny_sd: Path) -> None:
    """Both are one-step truncated back-propagation through a guided DDIM chain, computed independently."""
    model = StableDiffusion(str(tiny_sd), guidance=Guidance(3.0))
    for _, value in model.trainable_parameters():
        value.data += 0.05
    module = DraftModule(model, ColorTarget(), DDIM(3, spacing="trailing"), LastK(1))
    results = []
    for setting in fast.SETTINGS[:3]:
        loss = fast.loss(module, setting, ["a red cat", "dog"], seed=0)
        gradients = torch.autograd.grad(loss, list(module.trainable_parameters().values()))
        results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    for loss, gradient in results[:2]:
        torch.testing.assert_close(loss, results[2][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, results[2][1], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
