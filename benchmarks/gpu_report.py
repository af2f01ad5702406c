"""The rows of the GPU benchmark as a page and as a JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

GIB = 2**30
HEAD = ["denoiser", "case", "plan, GiB", "peak, GiB", "peak / plan", "s / step", "share of bf16 peak"]
WIDTHS = [8, 36, 12, 12, 11, 9, 18]


@dataclass
class Row:
    """A measured case; what was not measured is `None`.

    Args:
        denoiser: Name of the denoiser.
        case: Name of the case.
        plan: Predicted peak in bytes.
        peak: Measured peak in bytes.
        seconds: Median seconds of a training step.
        share: Share of the measured bf16 peak.
        problem: Why something is missing, in one line.
    """

    denoiser: str
    case: str
    plan: int | None = None
    peak: int | None = None
    seconds: float | None = None
    share: float | None = None
    problem: str | None = None

    @property
    def ratio(self) -> float | None:
        """The measured peak divided by the predicted one."""
        return None if self.plan is None or self.peak is None else self.peak / self.plan

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        missing = self.problem if self.seconds is None and self.problem else ""
        values = [_text(self.plan, GIB), _text(self.peak, GIB), _text(self.ratio), _text(self.seconds, digits=3)]
        share = "" if self.share is None else f"{self.share:.1%}"
        return [self.denoiser, self.case, *values, missing or share]


@dataclass
class Report:
    """The page and the JSON file, both complete after each row."""

    title: str
    page: Path | None
    json: Path | None
    rows: list[Row] = field(default_factory=list)

    def start(self) -> None:
        """Print the title and the head of the table."""
        if self.page is not None:
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.page.write_text("")
        rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(WIDTHS)]
        self._line(f"{self.title}\n\n{_padded(HEAD)}\n{_padded(rule)}")

    def add(self, row: Row) -> None:
        """Print and write a row."""
        self.rows.append(row)
        self._line(_padded(row.cells()))
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            rows = [{**asdict(each), "peak_over_plan": each.ratio} for each in self.rows]
            self.json.write_text(json.dumps({"title": self.title, "rows": rows}, indent=2) + "\n")

    def _line(self, text: str) -> None:
        print(text, flush=True)
        if self.page is not None:
            with self.page.open("a") as page:
                page.write(text + "\n")


def _padded(cells: list[str]) -> str:
    padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))]
    return f"| {' | '.join(padded)} |"


def _text(value: float | None, unit: float = 1, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
