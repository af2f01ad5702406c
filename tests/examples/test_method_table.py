"""The method table: counts, conclusions, and continuation after an interruption."""

import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.method_table import __main__ as command
from examples.method_table import methods, report
from examples.method_table.measure import Evaluation
from examples.method_table.runs import Run, RunFile
from lightning_draft.advantages import AdvantageEstimator
from lightning_draft.forward_objectives import ForwardObjective
from lightning_draft.gradient_matching import GradientMatching
from lightning_draft.objectives import Objective
from lightning_draft.rewards import Prompt
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import Truncation
from lightning_draft.windows import StepWindow

STEPS = 3
BUDGET = 100
NAMES = ("cat", "dog", "bed", "ant")
PASSES = {
    "DRaFT": (2 * STEPS, STEPS),
    "DRaFT-1": (STEPS, 1),
    "DRaFT-LV": (STEPS + 2, 1 + 2),
    "REINFORCE": (STEPS + STEPS, STEPS),
    "MixGRPO": (STEPS + 2, 2),
    "DiffusionNFT": (STEPS + STEPS, STEPS),
    "VGG-Flow": (STEPS + 4 * 3, 3),
}
"""Forward and backward passes a sample in one training step."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,caption\n" + "".join(f"{name},a {name}\n" for name in NAMES))
    return file


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"a {name}\n" for name in NAMES))
    return file


@pytest.fixture
def setting(tiny_sd: Path, tiny_clip: Path, prompts: Path, captions: Path) -> methods.Setting:
    return methods.Setting(str(tiny_sd), str(tiny_clip), str(prompts), str(prompts), str(captions), STEPS)


@pytest.fixture
def run(
    tiny_sd: Path,
    tiny_clip: Path,
    prompts: Path,
    captions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Path]:
    def start(*words: str, budget: int = 1, lrs: str = "1e-3", steps: int = STEPS) -> Path:
        options = {
            "out": tmp_path,
            "model": tiny_sd,
            "clip": tiny_clip,
            "budget": budget,
            "sampling-steps": steps,
            "prompts": prompts,
            "captions": captions,
            "training-images": tmp_path / "none",
            "many": prompts,
            "evaluated": 2,
            "images-per-prompt": 2,
            "seeds": 0,
            "lrs": lrs,
        }
        arguments = [text for key, value in options.items() for text in (f"--{key}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", ["method_table", *arguments, *words])
        command.main()
        return tmp_path

    return start


@pytest.mark.parametrize("method", list(PASSES))
def test_passes_of_one_step_equal_the_expected_cost(method: str, setting: methods.Setting, tmp_path: Path) -> None:
    """The expected cost: a forward pass per step, another if it is recomputed, and a backward pass."""
    table = command.Table(setting, tmp_path, budget=1, evaluation=(2, 2))
    result = table.run("recognized", method, methods.METHODS[method].trials()[0], seed=0)
    samples = 8 if method in {**methods.DIRECT, **methods.MATCHING} else 16
    queries = {"DRaFT-LV": 3, "VGG-Flow": 1 + 3}.get(method, 1)
    assert len(result["curve"]) == len(result["evaluations"]) == 1
    forwards, backwards = PASSES[method]
    assert result["evaluations"][0]["forwards"] == forwards * samples
    assert result["evaluations"][0]["passes"] == (forwards + backwards) * samples
    assert result["evaluations"][0]["queries"] == samples * queries
    assert result["peak_mib"] > 0


def test_learning_rate_is_tuned_on_separate_seeds(run: Callable[..., Path]) -> None:
    out = run("--tasks", "recognized", "--methods", "DRaFT-1", budget=BUDGET, lrs="1e-9 1e-3 3e-2")
    heat = {lr: end(out, lr=lr, seed=command.SHORT) for lr in (1e-9, 1e-3, 3e-2)}
    finalists = sorted(heat, key=lambda lr: heat[lr]["reward"])[1:]
    finals = {lr: end(out, lr=lr, seed=command.FINAL) for lr in finalists}
    assert sum(run.get("seed") == command.FINAL for run in RunFile(out / "runs.jsonl").all()) == 2
    best = max(finals, key=lambda lr: finals[lr]["reward"])
    assert f"| DRaFT-1 | {best:g} |" in (out / "methods.md").read_text()
    assert end(out, lr=best, seed=0)["passes"] == finals[best]["passes"] >= BUDGET > heat[best]["passes"]


def find(out: Path, **identity: object) -> Run:
    run = RunFile(out / "runs.jsonl").find(task="recognized", **identity)
    assert run is not None, identity
    return run


def end(out: Path, **identity: object) -> dict[str, float]:
    return find(out, method="DRaFT-1", **identity)["evaluations"][-1]


def test_an_interrupted_table_continues_without_repeating_runs(run: Callable[..., Path], tmp_path: Path) -> None:
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
    kept = {"task": "recognized", "method": "DRaFT-1", "lr": 1e-3, "own": None, "start": -1.0, "peak_mib": 3.0}
    curve = [{"reward": -0.7, "gradient_norm": 2.5}]
    for seed in (0, command.SHORT, command.FINAL):
        RunFile(tmp_path / "runs.jsonl").add({**kept, "seed": seed, "evaluations": [row], "curve": curve})
    run("--tasks", "recognized", "--methods", "DRaFT-1", "DRaFT-LV")
    lines = (tmp_path / "methods.md").read_text().splitlines()
    assert any(line.startswith("| DRaFT-1 | 0.001 |  | 7 | 9 | 5 | 1 | -0.5 |") for line in lines)
    assert any(line.startswith("| DRaFT-LV | 0.001 |  | 1 |") for line in lines)
    assert any(line.startswith("| DRaFT-1 | 2 | 4 | 4 |  | 2.5 | -0.7 |") for line in lines)
    assert (tmp_path / "methods-recognized.png").stat().st_size > 0


def add_runs(file: Path, method: str, number: int) -> None:
    for seed in range(number):
        RunFile(file).add({"task": "t", "method": method, "seed": seed, "curve": [{"steps": 1, "reward": seed / 3}]})


def test_two_processes_can_append_runs_to_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=add_runs, args=(file, method, 20)) for method in ("b", "a")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    runs = RunFile(file).all()
    assert [run["method"] for run in runs] == ["a"] * 20 + ["b"] * 20
    assert {run["seed"] for run in runs} == set(range(20))
    assert file.read_text().splitlines() == sorted(file.read_text().splitlines())
    assert [path.name for path in file.parent.iterdir()] == ["runs.jsonl"]


def test_stored_run_is_read_in_single_precision(tmp_path: Path) -> None:
    rewards = torch.randn(50, generator=torch.Generator().manual_seed(0))
    rows = [{"steps": step, "reward": reward} for step, reward in enumerate(rewards.tolist())]
    runs = RunFile(tmp_path / "runs.jsonl")
    added = runs.add({"task": "t", "lr": 1 / 3, "own": None, "curve": rows})
    assert runs.all() == [added]
    assert runs.find(own=None, lr=1 / 3) == added
    assert runs.find(own=1.0) is None
    assert torch.equal(torch.tensor([row["reward"] for row in added["curve"]]), rewards)
    assert [row["steps"] for row in added["curve"]] == list(range(50))


def test_published_table_equals_the_table_of_the_published_runs(tmp_path: Path) -> None:
    published = Path(command.__file__).parents[1] / "results" / "methods"
    (tmp_path / "runs.jsonl").write_text((published / "runs.jsonl").read_text())
    setting = methods.Setting("m", "c", "animals", "animals", "animals", STEPS)
    command.write(command.Table(setting, tmp_path, 1, (2, 2)), list(methods.TASKS))
    assert (tmp_path / "methods.md").read_text() == (published / "methods.md").read_text()


def test_table_covers_every_strategy() -> None:
    from lightning_draft.cli.hints import subclasses

    bases = (Truncation, GradientMatching, Objective, ForwardObjective, AdvantageEstimator, StepWindow)
    known = {kind for kind in subclasses(bases) if kind.__module__.startswith("lightning_draft.")}
    used = set()
    for method in methods.METHODS.values():
        trial = method.trials()[0]
        module = method.module(trial.own, model=LinearModel(), reward=LinearReward(), sampler=DDIM(4, eta=1.0))
        parts = [*module.strategies().values(), module.method, getattr(module, "truncation", None)]
        used |= {type(part) for part in parts}
    assert known <= used
    assert set(methods.TASKS["recognized"].methods) == set(methods.METHODS)
    assert set(methods.TASKS["jpeg"].methods) == {*methods.POLICY, *methods.FORWARD}


def test_method_parameter_is_tuned_with_the_learning_rate(run: Callable[..., Path]) -> None:
    """PRDP's squared error is 1/beta^2 of that of the reward at the start, so that the used value can be checked."""
    out = run("--tasks", "recognized", "many", "--methods", "PRDP", lrs="1e-3 1e-2", steps=2)
    found = [run for run in RunFile(out / "runs.jsonl").all() if run["method"] == "PRDP"]
    tried = {(each["lr"], each["own"]): each for each in found if each["seed"] == command.SHORT}
    final = {(each["lr"], each["own"]): each for each in found if each["seed"] == command.FINAL}
    assert set(tried) == {(lr, beta) for lr in (1e-3, 1e-2) for beta in methods.METHODS["PRDP"].values}
    norms = {beta: tried[1e-3, beta]["curve"][0]["gradient_norm"] for beta in methods.METHODS["PRDP"].values}
    assert norms[0.001] == pytest.approx(100 * norms[0.1], rel=1e-3)
    best = max(final, key=lambda trial: final[trial]["evaluations"][-1]["reward"])
    trained = {each["task"]: (each["lr"], each["own"]) for each in found if each["seed"] == 0}
    assert trained == {"recognized": best, "many": best}


def test_finalists_differ_in_their_learning_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reached = {(1e-3, 0.03): 1, (1e-3, 0.1): 2, (1e-2, 0.03): 5, (1e-2, 0.1): 4, (3e-3, 0.03): 3, (3e-3, 0.1): 0}
    raced = []

    def run(self: command.Table, task: str, method: str, trial: methods.Trial, seed: int, share: float) -> Run:
        if seed == command.FINAL:
            raced.append((trial.lr, trial.own))
            return {"evaluations": [{"reward": -trial.lr}]}
        return {"evaluations": [{"reward": reached.get((trial.lr, trial.own), -1)}]}

    monkeypatch.setattr(command.Table, "run", run)
    setting = methods.Setting("m", "c", "animals", "animals", "animals", STEPS)
    chosen = command.Table(setting, tmp_path, 1, (2, 2)).tuned("recognized", "PPO", None)
    assert raced == [(1e-2, 0.03), (3e-3, 0.03)]
    assert chosen == methods.Trial(3e-3, 0.03)


def test_queries_are_compared_between_methods() -> None:
    def run(method: str, *rows: tuple[int, float]) -> Run:
        evaluations = [{"queries": q, "passes": q, "steps": q, "reward": reward} for q, reward in rows]
        curve = [{"reward": 0.0, "gradient_norm": 1.0}]
        return {"task": "t", "method": method, "start": -1.0, "evaluations": evaluations, "curve": curve}

    runs = [run("PPO", (400, -0.2), (800, -0.5)), run("DRaFT", (40, -0.5), (80, 0.0)), run("PRDP", (800, -0.6))]
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in report.efficiency(runs).splitlines() if "|" in line}
    assert rows["DRaFT"][4] == "20.0"
    assert rows["PRDP"][4] == "not reached"
    assert rows["PPO"][7] == "-0.2"


@pytest.mark.parametrize(("level", "queries"), [(-1.0, 0), (-0.75, 50), (0.0, 150), (0.5, 175), (1.1, math.inf)])
def test_queries_to_a_level_are_interpolated(level: float, queries: float) -> None:
    rows = [{"queries": 100, "reward": -0.5}, {"queries": 200, "reward": 1.0}, {"queries": 400, "reward": 0.5}]
    reached = report.to_reach({"start": -1.0, "evaluations": rows}, level)
    assert reached == pytest.approx({0.0: 100 + 100 / 3, 0.5: 100 + 200 / 3}.get(level, queries))


def test_standard_error_equals_numpy() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean, error = report.mean_and_error(values.tolist())
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx((values.std() / 3**0.5).item())


def test_evaluation_is_reproducible(tiny_sd: Path, tiny_clip: Path) -> None:
    setting = methods.Setting(str(tiny_sd), str(tiny_clip), "animals", "animals", "animals", STEPS)
    module = methods.METHODS["DRaFT-1"].build(setting, "recognized", methods.Trial(1e-3), 0)
    prompts = [Prompt("cat", {"caption": "a cat"}), Prompt("bed", {"caption": "a bed"})]
    evaluation = Evaluation(prompts, images_per_prompt=2)
    images, prompts = evaluation.images(module)
    first = evaluation.scores(module, images)
    torch.randn(3)
    assert evaluation.scores(module, images) == first
    assert first["drift"] == 0
    assert prompts == ["cat", "cat", "bed", "bed"]
    pairs = (images[0] - images[1], images[2] - images[3])
    expected = torch.stack([pair.square().mean().sqrt() for pair in pairs]).mean().item()
    assert first["diversity"] == pytest.approx(expected, rel=1e-4)
