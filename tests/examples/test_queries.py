"""The count of reward queries until an evaluation is reached."""

from pathlib import Path

import pytest

from examples import queries
from examples.method_table.runs import RunFile


def test_each_config_trains_until_the_level_is_reached_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--num-steps", "2", "--prompts", "1", "--seeds", "0", "--level", "-9"]
    words += ["--clean-images", "none"]
    queries.main(words)
    queries.main(words)
    runs = {run["config"]: run for run in RunFile(tmp_path / "runs.jsonl").all()}
    assert {*runs} == {"draft", "draft_1", "ppo"}
    assert all(len(run["evaluations"]) == 2 for run in runs.values()), "the first evaluation reaches the level"
    assert capsys.readouterr().out.count("ppo, seed 0") == 1


def test_the_table_has_the_queries_at_the_level_or_the_number_of_runs_that_reached_it() -> None:
    def run(config: str, *evaluations: float) -> dict[str, object]:
        rows = [
            {"evaluation": e, "queries": 10 * i, "passes": 100 * i, "seconds": i} for i, e in enumerate(evaluations)
        ]
        return {"config": config, "evaluations": rows}

    runs = [run("draft", -1.0, -0.6, -0.4), run("draft", -1.0, -0.4), run("ppo", -1.0, -0.9)]
    lines = queries.table(runs, -0.5).splitlines()
    assert lines[2].startswith("| draft | 2 | 12 ± 3 | 117 ± 33 | 1 ± 0 | -0.40 ± 0.00 |")
    assert lines[3].startswith("| ppo | 1 | reached by 0 | reached by 0 | reached by 0 |")


def test_every_compared_config_has_stored_runs_with_its_tuned_options() -> None:
    assert {run["config"] for run in queries.TUNED.all()} == set(queries.shipped_configs())
