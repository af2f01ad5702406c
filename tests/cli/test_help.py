"""The help pages and the version."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from lightning_draft import __version__

HEAVY = ("torch", "lightning", "diffusers", "transformers", "jsonargparse", "numpy")


PAGES = [["--version"], ["--help"], [], ["configs", "list"], ["configs", "show", "draft"], ["fit", "--help"]]


def test_help_pages_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lightning_draft.__main__ import main\n"
        f"for args in {PAGES!r}: assert main(args) == 0\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), sorted(set({HEAVY!r}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version_is_printed(command: Callable) -> None:
    assert command("--version").out == f"lightning-draft {__version__}\n"


def test_help_lists_every_callback_and_command(command: Callable) -> None:
    from lightning_draft import callbacks
    from lightning_draft.cli.callback_options import CALLBACK_OPTIONS

    page = command("fit", "--help").out
    assert len(page.splitlines()) < 50
    assert all(f"--{option.key}" in page and option.help in page for option in CALLBACK_OPTIONS)
    assert {option.class_name for option in CALLBACK_OPTIONS} == set(callbacks.__all__) - {"RandomState"}
    assert all(f"lightning-draft {name}" in command().out for name in ("fit", "validate", "sample", "configs"))


@pytest.mark.parametrize("args", [["sample", "runs/x"], ["score", "."], ["lora", "mix"], ["plan", "--config", "draft"]])
def test_help_after_other_arguments_shows_the_page_of_the_command(args: list[str], command: Callable) -> None:
    assert command(*args, "--help").out.startswith(f"lightning-draft {args[0]}: ")


def test_every_option_has_its_help_from_the_docstring(command: Callable) -> None:
    every = command("fit", "--help_all").out
    assert "--trainer.accumulate_grad_batches" in every
    truncation = command("fit", "--model.help", "DraftModule").out
    assert "Which steps have a gradient; by default `LastK(1)`" in " ".join(truncation.split())
    nested = command("fit", "--model.model.help", "StableDiffusion").out
    assert "--model.model.pretrained" in nested
    assert "--model.pretrained" not in nested
    samples = command("fit", "--samples.help", "SampleLogger").out
    assert "Optimization steps between grids." in samples
