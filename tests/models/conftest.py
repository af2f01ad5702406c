"""Small random pipelines of the newer model families."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_families import write


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write each pipeline when it is first used."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write(name, root / name)

    return folder
