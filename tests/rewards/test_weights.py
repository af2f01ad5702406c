"""Weight files are found, verified and read; each error message says what to do."""

import hashlib
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.weights import PublishedFile, find_file, load_state, read_tensors

CONTENT = b"seven bytes, and more"
PUBLISHED = PublishedFile("owner/model", "sub/weights.pt", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with `sub/weights.pt` of `owner/model`, laid out as huggingface_hub does; returns the blob."""
    root = tmp_path / "hub" / "models--owner--model"
    blob, snapshot = root / "blobs" / "digest", root / "snapshots" / ("0" * 40) / "sub" / "weights.pt"
    for file in (blob, snapshot, root / "refs" / "main"):
        file.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    snapshot.symlink_to(blob)
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return blob


@pytest.mark.parametrize("within", [".", "weights.pt"])
def test_local_file_is_found_by_its_path_or_its_folder(within: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    assert find_file(PUBLISHED, str(tmp_path / within)) == tmp_path / "weights.pt"


def test_cached_files_need_no_connection(hub: Path) -> None:
    path = find_file(PUBLISHED)
    assert path.name == "weights.pt"
    assert path.resolve() == hub.resolve()


def test_failed_download_is_an_error_with_instructions(hub: Path) -> None:
    message = (
        r"other.pt of hub repository owner/model is not in the hub's cache .* could not be downloaded \(.+\); "
        r"download it on a machine with a connection and write checkpoint=FOLDER/other.pt"
    )
    with pytest.raises(ConfigurationError, match=message) as caught:
        find_file(PublishedFile("owner/model", "other.pt"), argument="checkpoint")
    assert "http" not in str(caught.value)


def test_missing_local_file_is_an_error(tmp_path: Path) -> None:
    for local, missing in ((tmp_path / "none.pt", "none.pt"), (tmp_path, "weights.pt")):
        message = f"head='{local}': {tmp_path / missing} does not exist.*leave head out to use weights.pt of hub repos"
        with pytest.raises(ConfigurationError, match=message):
            find_file(PUBLISHED, str(local), argument="head")


@pytest.mark.parametrize(
    ("content", "difference"),
    [(CONTENT[:-1], "it has 20 bytes and not 21"), (CONTENT[::-1], "its SHA-256 starts with [0-9a-f]{12} and not")],
)
def test_damaged_files_are_rejected(content: bytes, difference: str, hub: Path, tmp_path: Path) -> None:
    hub.write_bytes(content)
    (tmp_path / "weights.pt").write_bytes(content)
    for local, file in ((None, hub), (str(tmp_path), tmp_path / "weights.pt")):
        message = (
            f"is not weights.pt of hub repository owner/model: {difference}.*delete {re.escape(str(file.resolve()))}"
        )
        with pytest.raises(ConfigurationError, match=message):
            find_file(PUBLISHED, local)


def test_local_file_of_another_name_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_bytes(b"other")
    assert find_file(PUBLISHED, str(tmp_path / "mine.pt")) == tmp_path / "mine.pt"


def test_tensors_are_read_from_every_format(tmp_path: Path) -> None:
    tensors = nn.Linear(3, 2).state_dict()
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.pth")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "c.pt")
    torch.save(tensors, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    for name, key in (
        ("a.safetensors", "state_dict"),
        ("b.pth", "state_dict"),
        ("c.pt", "state_dict"),
        ("d.pth", None),
    ):
        read = read_tensors(tmp_path / name, key)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(ConfigurationError, match="c.pt contains no state dict: it must map names to tensors"):
        read_tensors(tmp_path / "c.pt")
    with pytest.raises(ConfigurationError, match="c.pt contains no state dict under 'model'"):
        read_tensors(tmp_path / "c.pt", "model")


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("code was run",))


def test_reading_weights_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Harmful()}, tmp_path / "harm.pt")
    with pytest.raises(
        ConfigurationError, match="harm.pt cannot be read as weights: .*a pickle that contains only tensors"
    ):
        read_tensors(tmp_path / "harm.pt")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.safetensors", "b.pth"])
def test_unreadable_files_are_rejected(name: str, tmp_path: Path) -> None:
    for content in (b"", b"<!DOCTYPE html><html>", b"PK\x03\x04 and nothing else"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"{name} cannot be read as weights: "):
            read_tensors(tmp_path / name)
    whole = tmp_path / "whole.pth"
    torch.save({"weight": torch.zeros(1000)}, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ConfigurationError, match=f"{name} cannot be read as weights: "):
        read_tensors(tmp_path / name)


def test_state_dict_must_match_exactly(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2).double()
    load_state(target, source.state_dict(), "file")
    assert torch.equal(target.weight, source.weight.double())
    tensors = source.state_dict()
    for change, message in (
        ({"bias": None}, "file does not fit: it lacks tensors \\(1\\), among them bias"),
        ({"scale": torch.ones(1)}, "file does not fit: it has unexpected tensors \\(1\\), among them scale"),
        ({"weight": torch.ones(2, 4)}, r"weight has shape \(2, 4\) instead of \(2, 3\)"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(ConfigurationError, match=message):
            load_state(target, changed, "file")
