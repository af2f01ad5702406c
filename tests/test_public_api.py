"""The public interface of the package."""

import subprocess
import sys

import pytest

import lightning_draft
from lightning_draft.models.families import FAMILIES


@pytest.mark.parametrize("name", lightning_draft.__all__)
def test_every_public_name_is_importable(name):
    assert getattr(lightning_draft, name).__name__ == name


def test_all_lists_every_lazily_imported_name():
    assert sorted([*lightning_draft._MODULE_OF, *FAMILIES]) == sorted(lightning_draft.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Draft'"):
        _ = lightning_draft.Draft


def test_importing_the_package_does_not_import_torch():
    code = "import sys, lightning_draft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_importable_before_anything_else():
    code = "from lightning_draft import StableDiffusion"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
