"""A short version of `python -m benchmarks.kill_storm --kills 200`."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.kill_moments import Kill
from benchmarks.kill_storm import replay, storm
from benchmarks.run_differences import differences


def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    outcome = storm(tmp_path, kills=4, seed=3, methods=("direct", "loop"))
    assert outcome.faults == []
    assert outcome.kills.total() == 4


def test_run_stopped_before_a_validation_and_killed_while_it_writes_an_image_of_the_model_card(tmp_path: Path) -> None:
    kills = [Kill("SIGTERM", "on_train_batch_start", 2), Kill("SIGKILL", "write .png", 2)]
    assert replay(tmp_path, "direct", kills) == []


def test_a_difference_in_any_file_is_found(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, value in ((ours, 1.0), (theirs, 1.0 + 2**-23)):
        folder.mkdir()
        save_file({"weight": torch.tensor([value])}, folder / "last.safetensors")
        torch.save({"state": [torch.tensor(value)], "seconds": value, "epoch": 3}, folder / "last.ckpt")
        (folder / "same.png").write_bytes(b"image")
    (ours / ".last.17.partial.ckpt").touch()
    assert differences(ours, theirs) == [
        ".last.17.partial.ckpt should not be there",
        "last.ckpt[state][0]",
        "last.safetensors[weight]",
    ]
    assert differences(theirs, theirs) == []
