"""Traces distinguish a change from rounding, and the recorded traces are those of the existing cases."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.traces.__main__ import PACKAGE, main
from tests.traces.cases import CASES, PPO, GroupRelative, draft, policy, write_pipelines
from tests.traces.compare import compare
from tests.traces.record import Trace, record

REFERENCE = Path(__file__).parent / "traces" / "reference.json"
CHANGES = {
    "truncation/last_k_2": draft(lr=1.001),
    "objective/ppo/group_mean": policy(objective=PPO(), lr=0.0301, inner_epochs=2, advantage_estimator=GroupRelative),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    write_pipelines(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    return {name: record(CASES[name], PACKAGE, pipelines, tmp_path_factory.mktemp("run")) for name in CHANGES}


@pytest.mark.parametrize("name", CHANGES)
def test_repeating_a_case_gives_an_identical_trace(
    name: str, recorded: dict[str, Trace], pipelines: Path, tmp_path: Path
) -> None:
    assert compare(recorded[name], record(CASES[name], PACKAGE, pipelines, tmp_path)).outcome == "identical"


@pytest.mark.parametrize("name", CHANGES)
def test_another_learning_rate_makes_a_trace_different(
    name: str, recorded: dict[str, Trace], pipelines: Path, tmp_path: Path
) -> None:
    verdict = compare(recorded[name], record(replace(CASES[name], module=CHANGES[name]), PACKAGE, pipelines, tmp_path))
    assert verdict.outcome == "different"
    assert "update_norm" in verdict.detail


def shortened(trace: Trace) -> None:
    trace["loss"].pop()


def rounded(trace: Trace) -> None:
    trace["loss"][1] *= 1 + 1e-7
    trace["params_sha256"][1] = "0" * 64


def rehashed(trace: Trace) -> None:
    trace["params_sha256"][-1] = "0" * 64


def cheaper(trace: Trace) -> None:
    trace["network_forwards"] -= 1


def infinite(trace: Trace) -> None:
    trace["grad_norm"][0] = float("nan")


def other_weights(trace: Trace) -> None:
    trace["network_sha256"] = "0" * 64


def without_reward(trace: Trace) -> None:
    del trace["reward"]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (cheaper, "identical"),
        (rounded, "equal to rounding"),
        (rehashed, "equal to rounding"),
        (shortened, "different"),
        (infinite, "different"),
        (other_weights, "different"),
        (without_reward, "different"),
    ],
)
def test_verdict_depends_on_the_difference(
    change: Callable[[Trace], None], outcome: str, recorded: dict[str, Trace]
) -> None:
    expected = recorded["truncation/last_k_2"]
    found = copy.deepcopy(expected)
    change(found)
    assert compare(expected, found).outcome == outcome


def test_comparison_with_a_changed_file_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "traces.json"
    arguments = [str(file), "--only", "truncation/last_k_1"]
    assert main(["record", *arguments]) == 0
    assert main(["compare", *arguments]) == 0
    saved: dict[str, Any] = json.loads(file.read_text())
    saved["cases"]["truncation/last_k_1"]["loss"][0] *= 1.01
    file.write_text(json.dumps(saved))
    assert main(["compare", *arguments]) == 1
    assert "loss: relative difference" in capsys.readouterr().out


def test_reference_contains_every_case() -> None:
    assert list(json.loads(REFERENCE.read_text())["cases"]) == list(CASES)


def test_recorded_runs_that_resume_equal_the_uninterrupted_ones() -> None:
    recorded = json.loads(REFERENCE.read_text())["cases"]
    resumed = {name: case.resume_after for name, case in CASES.items() if case.resume_after is not None}
    assert len(resumed) >= 5
    for name, batches in resumed.items():
        trace = recorded[name]
        for quantity in ("loss", "reward", "grad_norm", "params_sha256"):
            assert trace["resumed"][quantity] == trace[quantity][batches:], name
