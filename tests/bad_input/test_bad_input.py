"""Each row of the table gives one message with what it must say, and changes nothing; `docs/errors.md` holds it."""

import re
from pathlib import Path

import pytest

from lightning_draft.cli.option_checks import CHECKS, check_options
from lightning_draft.cli.run_folder import check_name
from tests.bad_input.cases import Case, built
from tests.bad_input.document import PAGE, row, rows_of
from tests.bad_input.runner import run
from tests.bad_input.table import CASES
from tests.bad_input.your_code import FILES, YOUR_CODE

_INTERNAL = re.compile(r"Union|jsonargparse|<class|Namespace\(|NestedArg|typing\.|Traceback|object at 0x")


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.shown}"[:90] for case in CASES])
def test_invalid_input_gives_one_message_and_changes_nothing(case: Case, tmp_path: Path) -> None:
    outcome = run(case, tmp_path)
    assert not outcome.error, outcome.error
    assert len(outcome.messages) == 1, outcome
    (message,) = outcome.messages
    assert [text for text in case.says if text not in message] == [], message
    assert not _INTERNAL.search(message), message
    assert "\n" not in message.strip()
    assert all(char.isprintable() for char in message), ascii(message)
    assert outcome.status == case.status
    assert bool(outcome.changed) == case.writes, outcome.changed
    assert row(case, message) in PAGE.read_text(encoding="utf-8"), "run python -m tests.bad_input.document"


def test_the_table_has_enough_rows_and_the_page_has_no_others() -> None:
    assert len(CASES) >= 250
    assert len({(case.kind, case.shown) for case in CASES}) == len(CASES)
    assert len(rows_of(PAGE.read_text(encoding="utf-8"))) == len(CASES)


@pytest.mark.parametrize("reward", YOUR_CODE)
def test_an_error_in_the_users_code_is_shown_with_its_last_frame(reward: str, tmp_path: Path) -> None:
    error, line = YOUR_CODE[reward]
    outcome = run(built("", ["--model.reward", reward], files=FILES), tmp_path)
    assert outcome.status == 1
    shown = outcome.error.strip().splitlines()
    assert any(text.startswith(error) for text in shown[-4:]), outcome.error
    assert any(line in text for text in shown[-6:]), outcome.error


@pytest.mark.parametrize("name", ["small", "a.b", "lr[1]", "group/small", "größe", "2024-01-01", "lr=1e-4,k=2"])
def test_valid_names_of_runs(name: str) -> None:
    assert check_name(name) == name


def test_every_checked_option_has_rows_and_a_valid_value() -> None:
    shown = {case.shown.split(" ")[0].removeprefix("--") for case in CASES}
    assert {check.name for check in CHECKS} <= shown
    check_options(dict.fromkeys((check.name for check in CHECKS), 1))
    check_options({check.name: None for check in CHECKS if check.name != "trainer.max_steps"})
