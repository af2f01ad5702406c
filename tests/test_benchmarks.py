"""The benchmarks with a small pipeline: the cost table, and memory that does not grow with T."""

import argparse
import logging
from pathlib import Path

import pytest

from benchmarks import common, gpu, memory, step_cost
from lightning_draft.models import Guidance, StableDiffusion
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


def test_the_gpu_benchmark_with_a_tiny_network_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--tiny", "--models", "sd15", "--cases", "full, both", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["gpu", *arguments, "--repeats", "1"])
    gpu.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "full, both" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "sd15"
    assert float(cells[4]) > 0
    assert float(cells[5].removesuffix("%")) > 0


def test_the_gpu_benchmark_trains_every_case_of_a_tiny_flux() -> None:
    for case in gpu.CASES:
        if not case.compile:
            assert gpu.seconds(gpu.build("flux", case, gpu.TINY, "cpu", 1), "cpu", 1) > 0


def test_the_gpu_benchmark_without_a_gpu_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU was found; run it on a machine with one" in capsys.readouterr().err
