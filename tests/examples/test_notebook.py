"""The notebook: its cells run in order, for a few steps, and no output is stored in it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lightning_draft.assets import FOLDER

NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_stores_no_output() -> None:
    assert not any(cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")


def test_notebook_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CODE[0] == "STEPS, BATCH_SIZE, SHOWN = 28, 8, 8"
    names: dict = {}
    for code in ("STEPS, BATCH_SIZE, SHOWN = 3, 1, 2", *CODE[1:]):
        exec(compile(code, "quickstart.ipynb", "exec"), names)
    assert names["before"].shape == names["after"].shape == (2, 3, 64, 64)
    assert not torch.equal(names["before"], names["after"])
    assert names["row"](names["after"]).size == (256, 128)
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "emoji64", dtype=torch.float32)
    pipeline.load_lora_weights("lora.safetensors")
