"""The device on which the prompts of a run are embedded."""

import pytest
import torch

from lightning_draft.cli import text_embedding


@pytest.mark.parametrize(
    ("devices", "rank", "index"),
    [("auto", 1, 1), (2, 1, 1), ([1], 0, 1), ("1,", 0, 1), ("0,2", 1, 2), ("[0, 2]", 1, 2), (-1, 0, 0), ("4", 3, 3)],
)
def test_prompts_are_embedded_on_the_gpu_that_the_process_trains_on(
    devices: object, rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert text_embedding._device("auto", devices) == torch.device("cuda", index)
    assert text_embedding._device("cpu", devices) == torch.device("cpu")
