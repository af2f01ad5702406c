"""The table of methods: what it counts, what it concludes, and that it picks up where it stopped."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.method_table import __main__ as command
from examples.method_table import methods, report
from examples.method_table.measure import Evaluation
from lightning_draft.rewards import Prompt

STEPS = 3
PASSES = {
    "DRaFT": (2 * STEPS, STEPS),
    "DRaFT-1": (STEPS, 1),
    "DRaFT-LV": (STEPS + 2, 1 + 2),
    "REINFORCE": (STEPS + STEPS, STEPS),
}
"""Forward and backward passes a sample in one training step."""


@pytest.fixture
def run(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Path]:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,caption\n" + "".join(f"{name},a {name}\n" for name in ("cat", "dog", "bed", "ant")))

    def start(*words: str, budget: int = 1, lrs: str = "1e-3") -> Path:
        options = {
            "out": tmp_path,
            "model": tiny_sd,
            "clip": tiny_clip,
            "budget": budget,
            "sampling-steps": STEPS,
            "prompts": prompts,
            "captions": "animals",
            "pictures": tmp_path / "none",
            "many": prompts,
            "evaluated": 2,
            "draws": 2,
            "seeds": 0,
            "lrs": lrs,
        }
        arguments = [text for key, value in options.items() for text in (f"--{key}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", ["method_table", *arguments, *words])
        command.main()
        return tmp_path

    return start


@pytest.mark.parametrize("method", ["DRaFT", "DRaFT-1", "DRaFT-LV", "REINFORCE"])
def test_passes_of_one_step(method: str, run: Callable[..., Path]) -> None:
    """The floor: a forward a step, a forward again where it is recomputed, a backward."""
    out = run("--tasks", "recognised", "--methods", method)
    result = json.loads((out / "runs" / f"recognised-{method}-lr0.001-seed0.json").read_text())
    samples = 8 if method in methods.DIRECT else 16
    copies = 3 if method == "DRaFT-LV" else 1
    assert len(result["curve"]) == len(result["evaluations"]) == 1
    forwards, backwards = PASSES[method]
    assert result["evaluations"][0]["forwards"] == forwards * samples
    assert result["evaluations"][0]["passes"] == (forwards + backwards) * samples
    assert result["evaluations"][0]["queries"] == samples * copies
    assert result["peak_mib"] > 0


def test_the_best_learning_rate_is_found_on_seeds_of_its_own(run: Callable[..., Path]) -> None:
    out = run("--tasks", "recognised", "--methods", "DRaFT-1", budget=400, lrs="1e-9 1e-3 3e-2")
    heat = {lr: _run(out, lr, command.HEAT) for lr in ("1e-09", "0.001", "0.03")}
    finalists = sorted(heat, key=lambda lr: heat[lr]["end"]["reward"])[1:]
    finals = {lr: _run(out, lr, command.FINAL) for lr in finalists}
    assert len(list((out / "runs").glob(f"*-seed{command.FINAL}.json"))) == 2
    best = max(finals, key=lambda lr: finals[lr]["end"]["reward"])
    assert f"| DRaFT-1 | {float(best):g} |" in (out / "methods.md").read_text()
    assert _run(out, best, 0)["end"]["passes"] == finals[best]["end"]["passes"] >= 400 > heat[best]["end"]["passes"]


def _run(out: Path, lr: str, seed: int) -> dict:
    run = json.loads((out / "runs" / f"recognised-DRaFT-1-lr{lr}-seed{seed}.json").read_text())
    return {**run, "end": run["evaluations"][-1]}


def test_an_interrupted_table_goes_on(run: Callable[..., Path], tmp_path: Path) -> None:
    row = {
        "steps": 7,
        "forwards": 6,
        "passes": 9,
        "queries": 5,
        "seconds": 1.0,
        "reward": -0.5,
        "diversity": 0.1,
        "drift": 0.2,
    }
    row |= {"retrieval": 0.25, "jpeg": -1.0, "sharpness": 0.1}
    kept = {"task": "recognised", "method": "DRaFT-1", "lr": 1e-3, "own": None, "start": -1.0, "peak_mib": 3.0}
    (tmp_path / "runs").mkdir()
    curve = [{"reward": -0.7, "gradient_norm": 2.5}]
    for seed in (0, command.HEAT, command.FINAL):
        file = tmp_path / "runs" / f"recognised-DRaFT-1-lr0.001-seed{seed}.json"
        file.write_text(json.dumps({**kept, "seed": seed, "evaluations": [row], "curve": curve}))
    run("--tasks", "recognised", "--methods", "DRaFT-1", "DRaFT-LV")
    lines = (tmp_path / "methods.md").read_text().splitlines()
    assert any(line.startswith("| DRaFT-1 | 0.001 |  | 7 | 9 | 5 | 1 | -0.5 |") for line in lines)
    assert any(line.startswith("| DRaFT-LV | 0.001 |  | 1 |") for line in lines)
    assert any(line.startswith("| DRaFT-1 | 2 | 4 | 4 |  | 2.5 | -0.7 |") for line in lines)
    assert (tmp_path / "methods-recognised.png").stat().st_size > 0


def test_every_method_and_truncation_is_in_it() -> None:
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.truncation import Truncation

    known = {kind.__name__ for kind in subclasses((Truncation,)) if kind.__module__.startswith("lightning_draft.")}
    assert len(methods.DIRECT) >= len(known)
    assert set(methods.TASKS["recognised"].methods) == set(methods.METHODS)
    assert set(methods.TASKS["jpeg"].methods) == set(methods.POLICY)


def test_a_parameter_of_its_own_is_tuned_with_the_learning_rate_and_taken_over(run: Callable[..., Path]) -> None:
    """PRDP's squared error is 1/beta^2 of the reward's at the start: what was tried was really used."""
    out = run("--tasks", "recognised", "many", "--methods", "PRDP", lrs="1e-3 1e-2")
    found = [json.loads(file.read_text()) for file in (out / "runs").glob("*-PRDP-*.json")]
    tried = {(each["lr"], each["own"]): each for each in found if each["seed"] == command.HEAT}
    final = {(each["lr"], each["own"]): each for each in found if each["seed"] == command.FINAL}
    assert set(tried) == {(lr, beta) for lr in (1e-3, 1e-2) for beta in methods.METHODS["PRDP"].values}
    norms = {beta: tried[1e-3, beta]["curve"][0]["gradient_norm"] for beta in methods.METHODS["PRDP"].values}
    assert norms[0.001] == pytest.approx(100 * norms[0.1], rel=1e-3)
    best = max(final, key=lambda trial: final[trial]["evaluations"][-1]["reward"])
    trained = {each["task"]: (each["lr"], each["own"]) for each in found if each["seed"] == 0}
    assert trained == {"recognised": best, "many": best}


def test_finalists_differ_in_their_learning_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reached = {(1e-3, 0.03): 1, (1e-3, 0.1): 2, (1e-2, 0.03): 5, (1e-2, 0.1): 4, (3e-3, 0.03): 3, (3e-3, 0.1): 0}
    raced = []

    def run(self: command.Table, task: str, method: str, trial: methods.Trial, seed: int, share: float) -> report.Run:
        if seed == command.FINAL:
            raced.append((trial.lr, trial.own))
            return {"evaluations": [{"reward": -trial.lr}]}
        return {"evaluations": [{"reward": reached.get((trial.lr, trial.own), -1)}]}

    monkeypatch.setattr(command.Table, "run", run)
    setting = methods.Setting("m", "c", "animals", "animals", "animals", STEPS)
    chosen = command.Table(setting, tmp_path, 1, (2, 2)).tuned("recognised", "PPO", None)
    assert raced == [(1e-2, 0.03), (3e-3, 0.03)]
    assert chosen == methods.Trial(3e-3, 0.03)


def test_queries_are_compared_with_those_of_the_rival() -> None:
    def run(method: str, *rows: tuple[int, float]) -> report.Run:
        evaluations = [{"queries": q, "passes": q, "steps": q, "reward": reward} for q, reward in rows]
        curve = [{"reward": 0.0, "gradient_norm": 1.0}]
        return {"task": "t", "method": method, "start": -1.0, "evaluations": evaluations, "curve": curve}

    runs = [run("PPO", (400, -0.2), (800, -0.5)), run("DRaFT", (40, -0.5), (80, 0.0)), run("PRDP", (800, -0.6))]
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in report.efficiency(runs).splitlines() if "|" in line}
    assert rows["DRaFT"][4] == "20.0"
    assert rows["PRDP"][4] == "not reached"
    assert rows["PPO"][7] == "-0.2"


@pytest.mark.parametrize(("level", "queries"), [(-1.0, 0), (-0.75, 50), (0.0, 150), (0.5, 175), (1.1, math.inf)])
def test_queries_to_a_level_lie_on_the_line_between_milestones(level: float, queries: float) -> None:
    rows = [{"queries": 100, "reward": -0.5}, {"queries": 200, "reward": 1.0}, {"queries": 400, "reward": 0.5}]
    reached = report.to_reach({"start": -1.0, "evaluations": rows}, level)
    assert reached == pytest.approx({0.0: 100 + 100 / 3, 0.5: 100 + 200 / 3}.get(level, queries))


def test_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean, error = report.mean_and_error(values.tolist())
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx((values.std() / 3**0.5).item())


def test_evaluation_repeats(tiny_sd: Path, tiny_clip: Path) -> None:
    setting = methods.Setting(str(tiny_sd), str(tiny_clip), "animals", "animals", "animals", STEPS)
    module = methods.METHODS["DRaFT-1"].build(setting, "recognised", methods.Trial(1e-3), 0)
    evaluation = Evaluation([Prompt("cat", {"caption": "a cat"}), Prompt("bed", {"caption": "a bed"})], draws=2)
    images, prompts = evaluation.pictures(module)
    first = evaluation.scores(module, images)
    torch.randn(3)
    assert evaluation.scores(module, images) == first
    assert first["drift"] == 0
    assert prompts == ["cat", "cat", "bed", "bed"]
    pairs = (images[0] - images[1], images[2] - images[3])
    expected = torch.stack([pair.square().mean().sqrt() for pair in pairs]).mean().item()
    assert first["diversity"] == pytest.approx(expected, rel=1e-4)
