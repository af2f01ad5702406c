"""Record or compare traces of training."""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning as L
import torch

from tests.traces.cases import CASES, METRICS, denoiser, exported, trainable, write_pipelines
from tests.traces.compare import TOLERANCE, Verdict, compare
from tests.traces.record import Package, Trace, record

PACKAGE = Package(METRICS, trainable, denoiser, exported)


def traces(names: Iterable[str]) -> Iterator[tuple[str, Trace]]:
    """Train cases one after the other."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        pipelines = Path(temporary) / "pipelines"
        write_pipelines(pipelines)
        for number, name in enumerate(names):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            yield name, record(CASES[name], PACKAGE, pipelines, folder)


def environment() -> dict[str, str]:
    """Return the environment and the commit of the traces."""
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"commit": commit, "torch": torch.__version__, "lightning": L.__version__, "cpu": capability}


def chosen(names: Iterable[str], prefixes: list[str] | None) -> list[str]:
    """Return the names that start with one of the prefixes; all names without prefixes."""
    return [name for name in names if not prefixes or name.startswith(tuple(prefixes))]


def record_file(file: Path, prefixes: list[str] | None) -> int:
    """Record cases to a file; with prefixes, replace these cases and keep the others."""
    known: dict[str, Any] = json.loads(file.read_text())["cases"] if prefixes and file.exists() else {}
    start = time.monotonic()
    new = dict(traces(chosen(CASES, prefixes)))
    cases = {name: {**known, **new}[name] for name in CASES if name in known or name in new}
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(trace, separators=(',', ':'))}" for name, trace in cases.items()
    )
    file.write_text(f'{{"environment": {json.dumps(environment())},\n"cases": {{\n{lines}\n}}}}\n')
    print(f"{len(new)} cases recorded in {time.monotonic() - start:.0f} s")
    return 0


def compare_file(file: Path, prefixes: list[str] | None, tolerance: float) -> int:
    """Repeat the cases of a file, print a verdict for each, and return the exit status."""
    saved = json.loads(file.read_text())
    here, there = environment(), saved["environment"]
    print(f"recorded at {there}, compared at {here}")
    names = chosen(saved["cases"], prefixes)
    verdicts = {name: Verdict("different", "there is no such case now") for name in names if name not in CASES}
    for name, trace in traces(name for name in names if name in CASES):
        verdicts[name] = compare(saved["cases"][name], trace, tolerance)
    width = max((len(name) for name in names), default=0)
    for name in names:
        print(f"{name:{width}}  {verdicts[name].outcome:17}  {verdicts[name].detail}".rstrip())
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(v.outcome for v in verdicts.values()).items()))
    return 0 if verdicts and all(verdict.passed for verdict in verdicts.values()) else 1


def main(words: list[str] | None = None) -> int:
    """Parse the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.traces", description=__doc__)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="cases whose names start with one of these")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="what counts as rounding, relative")
    arguments = parser.parse_args(words)
    if arguments.action == "record":
        return record_file(arguments.file, arguments.only)
    return compare_file(arguments.file, arguments.only, arguments.tolerance)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
