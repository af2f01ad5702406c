"""The public interface of the package."""

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
