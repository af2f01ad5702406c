"""The method table: tuning, seeds, costs, conclusions, and continuation after an interruption."""

import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.method_table import __main__ as command
from examples.method_table import measure, methods, report
from examples.method_table.runs import Run, RunFile
from examples.method_table.tuning import Options, Report, around, tune
from lightning_draft.forward_objectives import ForwardObjective
from lightning_draft.gradient_matching import GradientMatching
from lightning_draft.objectives import Objective
from lightning_draft.truncation import Truncation
from lightning_draft.windows import StepWindow


def words(value: Any) -> set[str]:
    """Return all texts in a nested config."""
    if isinstance(value, dict):
        return set().union(*map(words, value.values()))
    return {value} if isinstance(value, str) else set()


def test_table_covers_every_strategy() -> None:
    from lightning_draft.cli.hints import subclasses

    bases = (Truncation, GradientMatching, Objective, ForwardObjective, StepWindow)
    known = {kind.__name__ for kind in subclasses(bases) if kind.__module__.startswith("lightning_draft.")}
    texts = [(methods.CONFIGS / f"{name}.yaml").read_text() for name in methods.shipped_configs()]
    assert known <= set().union(*(words(yaml.safe_load(text)) for text in texts))


def test_table_has_the_methods_and_not_the_other_tasks() -> None:
    names = {*methods.shipped_configs()}
    assert {"draft", "draft_k", "draft_lv", "refl", "drtune", "alignprop", "reinforce", "ppo", "loop", "prdp"} <= names
    assert not {"quickstart", "compositions", "guard", "sd15_clip"} & names


@pytest.mark.parametrize("config", list(methods.OWN))
def test_ranges_of_own_parameters_contain_the_value_of_the_config(config: str) -> None:
    own = methods.OWN[config]
    assert own.low <= methods.written(config, own.option) <= own.high


def peak(options: Options) -> float:
    return -(math.log10(options["lr"] / 0.01) ** 2)


def test_tuning_returns_the_best_trial_and_uses_its_seconds(tmp_path: Path) -> None:
    tried: list[Options] = []

    def run(options: Options, report: Report) -> float:
        tried.append(options)
        for milestone in range(3):
            if report(peak(options), milestone):
                return 1.0
        return 3.0

    first = {"lr": 0.001}
    best = tune(tmp_path / "tuning.log", "method", first, around(first, {"lr": (1e-4, 1.0)}), 30, run)
    assert tried[0] == first
    assert 10 <= len(tried) <= 30
    assert best == max(tried, key=peak)
    assert peak(best) > peak(first)
    tune(tmp_path / "tuning.log", "method", first, around(first, {}), 30, run)
    assert tried[-1] != first, "a finished study was started again"


def test_tuning_ends_trials_below_the_median_early(tmp_path: Path) -> None:
    milestones: list[int] = []

    def run(options: Options, report: Report) -> float:
        score = 1.0 if not milestones else -1.0
        for milestone in range(3):
            milestones.append(milestone)
            if report(score, milestone):
                break
        return 1.0

    first = {"lr": 0.001}
    assert tune(tmp_path / "tuning.log", "method", first, around(first, {}), 3, run) == first
    assert milestones == [0, 1, 2, 0, 0]


def test_tuning_returns_the_first_options_if_no_score_is_finite(tmp_path: Path) -> None:
    def run(options: Options, report: Report) -> float:
        report(math.nan, 0)
        return 1.0

    first = {"lr": 0.001}
    assert tune(tmp_path / "tuning.log", "method", first, around(first, {}), 2, run) == first


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> command.Table:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "FRACTIONS", (1.0,))
        table = command.Table(tmp_path_factory.mktemp("table"), 0.01, 0.01, Path("none"), prompts=2)
        for seed in (0, 1):
            table.run("draft_k", seed)
    return table


def test_a_run_is_tuned_evaluated_and_costed(table: command.Table) -> None:
    run, other = table.runs()
    assert [row["steps"] for row in run["evaluations"]] == [0, 1]
    assert run["evaluations"][1]["queries"] == 8
    assert run["evaluations"][1]["passes"] == 8 * (10 + 2 * 5)  # five steps are recomputed and have a backward pass
    assert run["evaluations"][0]["drift"] == 0 < run["evaluations"][1]["drift"]
    assert run["options"] == other["options"] == {methods.LR: methods.written("draft_k", methods.LR)}
    assert table.file.find(config="draft_k", seed=0) == table.run("draft_k", 0)


def test_seeds_train_with_different_noise_and_prompts(table: command.Table) -> None:
    run, other = table.runs()
    assert run["evaluations"][0] == other["evaluations"][0]
    assert run["curve"][0]["gradient_norm"] != other["curve"][0]["gradient_norm"]


def test_tuning_uses_other_prompts_and_noise_than_the_evaluation(table: command.Table) -> None:
    assert table._tuning.seed != table._final.seed
    assert not {*table._tuning.prompts} & {*table._final.prompts}


def test_evaluation_is_reproducible(table: command.Table) -> None:
    model = methods.build("draft_k", 0, [])[0].model
    first = table._final(model)
    torch.randn(3)
    assert table._final(model) == first
    assert first["drift"] == 0


def rows(*values: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"seconds": c, "queries": 10 * c, "passes": 100 * c, "steps": c, "evaluation": e, "reward": e}
        for c, e in values
    ]


def a_run(config: str, seed: int, *values: tuple[float, float]) -> Run:
    curve = [{"seconds": 0.0, "gradient_norm": 2.0}]
    when = {"commit": "abc", "date": "2026-01-01", "options": {methods.LR: 0.001}}
    return {"config": config, "seed": seed, "evaluations": rows((0, -1.0), *values), "curve": curve, **when}


def test_the_fastest_method_is_first_and_missed_levels_are_stated(tmp_path: Path) -> None:
    runs = [
        a_run("draft", 0, (60, -0.5)),
        a_run("draft", 1, (70, -0.5)),
        a_run("ppo", 0, (99, -0.9)),
        a_run("draft_1", 0, (10, 0.0)),
    ]
    lines = [line.split(" | ") for line in report.leaderboard(report.grouped(runs), -0.5).splitlines()[2:]]
    assert [line[0] for line in lines] == ["| draft_1", "| draft", "| ppo"]
    assert lines[0][4:] == ["5.0", "50", "500 |"]
    assert lines[1][1:] == ["direct gradients", "lr 0.001", "2 of 2", "65.0 ± 5.0", "650 ± 50", "6,500 ± 500 |"]
    assert lines[2][3:5] == ["0 of 1", "not reached"]
    report.plot(runs, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 0


@pytest.mark.parametrize(("key", "cost"), [("queries", "100 reward queries"), ("passes", "1,000 network passes")])
def test_methods_are_compared_at_equal_queries_and_passes(key: str, cost: str) -> None:
    runs = [a_run("a", 0, (10, -0.5)), a_run("b", 0, (20, 0.0)), a_run("c", 0, (30, -0.9))]
    for run in runs:
        for row, psnr in zip(run["evaluations"], (20.0, 23.0), strict=True):
            row["PSNR"] = psnr
    heading, _, head, _, *table = report.equal(report.grouped(runs), key).splitlines()
    assert heading == cost
    assert head == "| config | evaluation | reward | PSNR |"
    assert {*table[:2]} == {"| a | -0.50 | -0.50 | 23.00 |", "| b | -0.50 | -0.50 | 21.50 |"}
    assert table[2] == "| c | -0.97 | -0.97 | 21.00 |"


def test_psnr_is_compared_at_an_equal_evaluation() -> None:
    runs = [a_run("a", 0, (10, -0.5), (20, 0.0)), a_run("b", 0, (30, -0.9))]
    for run in runs:
        for row, psnr in zip(run["evaluations"], (20.0, 21.0, 23.0), strict=False):
            row["PSNR"] = psnr
    head, _, *table = [line.split(" | ") for line in report.results(report.grouped(runs)).splitlines()]
    column = head.index("PSNR at evaluation -0.25")
    assert {line[0]: line[column] for line in table} == {"| a": "22.00", "| b": ""}


def test_each_kind_of_method_has_a_table_of_its_own_for_each_cost() -> None:
    page = report.page([a_run("draft", 0, (60, -0.5)), a_run("ppo", 0, (90, -0.9))], -0.5, 60, 120)
    costs = dict(section.split("\n", 1) for section in page.split("\n### ")[2:])
    assert [*costs] == ["At equal CPU seconds", "At equal reward queries", "At equal network passes"]
    for cost, section in costs.items():
        direct, policy = section.split("#### ")[1:]
        assert direct.startswith("Direct gradients")
        assert "| draft |" in direct
        assert policy.startswith("Policy gradients")
        assert "| ppo |" in policy
        assert ("900" in policy.splitlines()[0]) == (cost == "At equal reward queries")


@pytest.mark.parametrize(
    ("level", "seconds"), [(-1.0, 0), (-0.75, 50), (0.0, 400 / 3), (0.5, 500 / 3), (1.1, math.inf)]
)
def test_cost_to_a_level_is_interpolated(level: float, seconds: float) -> None:
    run = {"evaluations": rows((0, -1.0), (100, -0.5), (200, 1.0), (400, 0.5))}
    assert report.to_reach(run, level) == pytest.approx(seconds)


def test_a_level_is_not_reached_by_images_that_do_not_show_the_caption() -> None:
    found = rows((0, -1.0), (100, 0.0), (200, 0.5))
    for row, recognized in zip(found, (1.0, 0.94, 0.95), strict=True):
        row["recognized"] = recognized
    assert report.to_reach({"evaluations": found}, -0.5) == 100
    assert measure.objective(found[1]) == pytest.approx(-0.1)
    assert measure.objective(found[2]) == 0.5


def test_standard_error_equals_torch() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean, error = report.mean_and_error(values.tolist())
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx((values.std() / 3**0.5).item())


def add_runs(file: Path, config: str, number: int) -> None:
    for seed in range(number):
        RunFile(file).add({"config": config, "seed": seed, "curve": [{"steps": 1, "reward": seed / 3}]})


def test_two_processes_can_append_runs_to_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=add_runs, args=(file, config, 20)) for config in ("b", "a")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    runs = RunFile(file).all()
    assert [run["config"] for run in runs] == ["a"] * 20 + ["b"] * 20
    assert {run["seed"] for run in runs} == set(range(20))
    assert file.read_text().splitlines() == sorted(file.read_text().splitlines())
    assert [path.name for path in file.parent.iterdir()] == ["runs.jsonl"]


def test_stored_run_is_read_in_single_precision(tmp_path: Path) -> None:
    rewards = torch.randn(50, generator=torch.Generator().manual_seed(0))
    curve = [{"steps": step, "reward": reward} for step, reward in enumerate(rewards.tolist())]
    runs = RunFile(tmp_path / "runs.jsonl")
    added = runs.add({"config": "t", "limit": 1 / 3, "curve": curve})
    assert runs.all() == [added]
    assert runs.find(limit=1 / 3) == added
    assert runs.find(limit=1.0) is None
    assert torch.equal(torch.tensor([row["reward"] for row in added["curve"]]), rewards)
    assert [row["steps"] for row in added["curve"]] == list(range(50))
