"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import lightning_draft

PACKAGE = Path(lightning_draft.__file__).parent
FILES = [file for folder in (PACKAGE, *PACKAGE.iterdir()) if folder.is_dir() for file in sorted(folder.glob("*.py"))]
NAMES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES if ">>>" in file.read_text()
]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
