"""Write `docs/errors.md`: `python -m tests.bad_input.document`."""

import re
import tempfile
from itertools import groupby
from pathlib import Path

from tests.bad_input.cases import Case
from tests.bad_input.runner import run
from tests.bad_input.table import CASES

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
_HEAD = """\
# Error messages

Invalid input ends with one message and exit status 2, and nothing is written; if training itself or the service of
a reward fails, the status is 1. Errors in your own code are shown with their traceback.
This page lists the tested input by kind; it is generated with
`python -m tests.bad_input.document`. `FOLDER` is the current folder.
"""
_LONGEST = 260
_LIST = re.compile(r"((?:one of|are:?) [\w-]+)(?:, (?!(?:or|with|got)\b)[\w-]+){2,}(?: and \d+ more)?")  # they grow
_REPEATED = re.compile(r"((\w)\2{4})\2{5,}")
_LIBRARY = re.compile(r"(?<= checkpoint )\(.*?\)(?=; without a connection)")  # depends on the connection


def row(case: Case, message: str) -> str:
    """Return the row of a case in the table of its kind."""
    shown, message = (_REPEATED.sub(r"\1...", text) for text in (case.shown, message))
    message = _LIBRARY.sub("(...)", _LIST.sub(r"\1, ...", message))
    short = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 4].rpartition(' ')[0]} ..."
    return f"| {_code(shown)} | {_code(short)} |"


def rows_of(page: str) -> list[str]:
    """Return the rows of all tables of the page."""
    return [line for line in page.splitlines() if line.startswith("| `")]


def write() -> None:
    """Run all cases and write the page."""
    parts = [_HEAD]
    ordered = sorted(CASES, key=lambda case: [other.kind for other in CASES].index(case.kind))
    for kind, cases in groupby(ordered, key=lambda case: case.kind):
        lines = [f"## {kind}", "", "| Input | Message |", "|---|---|"]
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                outcome = run(case, Path(folder).resolve())
            lines.append(row(case, outcome.messages[0] if outcome.messages else outcome.error))
        parts.append("\n".join(lines) + "\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def _code(text: str) -> str:
    """Return a text as code in a cell of a table, on one line and with control characters escaped."""
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    plain = re.sub(r"\s+", " ", plain).replace("|", "\\|")
    ticks = "``" if "`" in plain else "`"
    return f"{ticks} {plain} {ticks}" if ticks == "``" else f"`{plain}`"


if __name__ == "__main__":
    write()
