"""The command line in this process, in an empty folder, with small random models."""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_draft.__main__ import main
from tests.tiny_families import write


@dataclass(frozen=True)
class Result:
    """The result of a command: exit status and output."""

    status: int
    out: str
    err: str


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; modules imported from it are removed from `sys.modules` afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def command(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run `lightning-draft` with arguments, in `workplace`."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                # Bound to the error stream of the test that imported Lightning, which is closed by now; pytest's own
                # handlers are of another class.
                if type(handler) is logging.StreamHandler:
                    monkeypatch.setattr(handler, "stream", sys.stderr)
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as end:
            status = int(end.code or 0)
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `small.yaml` that has changed the model visibly."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(SMALL.format(model=tiny_sd))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert (
            main(["fit", "--config", "small.yaml", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.05"]) == 0
        )
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def tiny_pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pixel-space pipeline."""
    return write("pixels", tmp_path_factory.mktemp("pipelines") / "tiny-pixels")


@pytest.fixture
def trained(workplace: Path, finished: Path) -> Path:
    """The config of a finished run, whose results are in `runs/small`."""
    shutil.copytree(finished, workplace, dirs_exist_ok=True)
    return workplace / "small.yaml"


@pytest.fixture
def config(workplace: Path, tiny_sd: Path) -> Path:
    """The config of a short run, `small.yaml`."""
    path = workplace / "small.yaml"
    path.write_text(SMALL.format(model=tiny_sd))
    return path


SMALL = """\
# A run of seconds.
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: StableDiffusion
      init_args: {{pretrained: {model}, guidance: {{scale: 2.0}}, lora: {{rank: 2}}}}
    sampler:
      class_path: DDIM
      init_args: {{num_steps: 3}}
    truncation:
      class_path: LastK
      init_args: {{k: 2}}
    reward:
      class_path: Brightness
      init_args: {{target: 0.9}}
data:
  prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]
  val_size: 2
  batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  val_check_interval: 2
gradients: {{figure_every_n_steps: 0}}
"""
