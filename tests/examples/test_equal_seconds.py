"""The comparison of settings at equal CPU seconds."""

import dataclasses
from pathlib import Path

import pytest

from examples.equal_seconds import __main__ as command
from examples.equal_seconds import experiments, measure, report
from examples.method_table.runs import Run, RunFile
from lightning_draft.testing import LinearReward


def run(setting: str, seed: int, order: int, reward: float) -> Run:
    rows = [{"seconds": 0.0, "steps": 0, "reward": -1.0}, {"seconds": 9.0, "steps": 4, "reward": reward}]
    curve = [{"seconds": float(i), "gradient_norm": float(10**i)} for i in range(3)]
    return {"setting": setting, "seed": seed, "order": order, "evaluations": rows, "curve": curve}


def test_the_table_has_means_and_standard_errors_over_the_seeds() -> None:
    runs = [run("b", 0, 1, 1.0), run("a", 0, 0, 2.0), run("b", 1, 1, 2.0), run("a", 1, 0, 2.0)]
    lines = report.table(runs).splitlines()
    assert lines[2] == "| a | 4 | -1.00 → 2.00 ± 0.00 | 10 → 10; 100 |"
    assert lines[3] == "| b | 4 | -1.00 → 1.50 ± 0.50 | 10 → 10; 100 |"


def test_every_experiment_trains_all_its_settings_on_the_same_task() -> None:
    for name, experiment in experiments.experiments(Path("students")).items():
        assert len(experiment.settings) >= 3, name
        assert all(setting.num_steps >= 1 for setting in experiment.settings.values())


def test_a_run_evaluates_before_and_after_its_seconds_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = experiments.experiments(tmp_path)
    draft = dataclasses.replace(known["small_batch"].settings["DRaFT-1"], num_steps=2, clip=None, skip=True)
    short = dataclasses.replace(known["small_batch"], settings={"DRaFT-1": draft}, fractions=(1.0,))
    monkeypatch.setattr(command, "experiments", lambda students: {"small_batch": short})
    options = ["x", "small_batch", "--out", str(tmp_path), "--seconds", "0.01", "--seeds", "1", "--prompts", "2"]
    monkeypatch.setattr("sys.argv", options)
    command.main()
    command.main()
    (found,) = RunFile(tmp_path / "small_batch.jsonl").all()
    assert [row["steps"] for row in found["evaluations"]] == [0, 1]
    assert found["evaluations"][1]["reward"] != found["evaluations"][0]["reward"]
    assert capsys.readouterr().out.count("seed 0") == 1
    monkeypatch.setattr("sys.argv", [*options[:-1], "3"])
    command.main()
    assert len(RunFile(tmp_path / "small_batch.jsonl").all()) == 2, "runs with other prompts are not the same"
    assert (tmp_path / "small_batch.png").exists()


def test_fast_settings_are_evaluated_in_exact_mode_and_by_their_own_chain() -> None:
    known = experiments.experiments(Path())["fast"]
    short = dataclasses.replace(known, fractions=(1.0,), batch_size=1)
    rows = []
    for label in ("exact", "both"):
        setting = dataclasses.replace(known.settings[label], num_steps=2)
        rows.append(measure.train(short, setting, 0, {}, seconds=0.0, prompts=1).evaluations[0])
    exact, both = rows
    assert exact["reward"] == exact["reward, own chain"] == pytest.approx(both["reward"], rel=1e-3)
    assert both["reward, own chain"] != pytest.approx(both["reward"], rel=1e-3)


def test_seeds_train_with_different_noise_and_prompts(tmp_path: Path) -> None:
    setting = experiments.experiments(tmp_path)["small_batch"].settings["DRaFT-1"]
    modules = [measure.module_of(setting, LinearReward(), seed) for seed in (0, 1)]
    assert [module.seed for module in modules] == [0, 1]
