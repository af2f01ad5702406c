"""Pipelines that are missing, damaged or not finite."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import StableDiffusion


def test_missing_pipelines_are_errors(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give a pipeline folder, a .safetensors file, a hub id"):
        StableDiffusion(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="missing.safetensors does not exist"):
        StableDiffusion("missing.safetensors")
    with pytest.raises(ValueError, match="it has no model_index.json; give the folder .* not one of its components"):
        StableDiffusion(str(tiny_sd / "unet"))
    with pytest.raises(ValueError, match="'nobody/nothing-at-all' .* not be downloaded from the hub .*local folder"):
        StableDiffusion("nobody/nothing-at-all")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a .safetensors file; convert it"):
        StableDiffusion(str(tmp_path / "model.ckpt"))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="is not a checkpoint of a known model; give one of Stable Diffusion 1.x and 2.x"
    ):
        StableDiffusion(str(tmp_path / "other.safetensors"), pretrained_config=str(tiny_sd))


def damaged(folder: Path, copy: Path, file: str, content: bytes | None) -> str:
    """Copy a pipeline, and change or remove one of its files."""
    shutil.copytree(folder, copy)
    path = copy / file
    if content is None:
        shutil.rmtree(path)
    else:
        path.write_bytes(content)
    return str(copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("unet/config.json", b"{", "unet/config.json is not valid JSON"),
        ("scheduler/scheduler_config.json", b"", "scheduler_config.json is not valid JSON"),
        ("vae/diffusion_pytorch_model.safetensors", b"", "model.safetensors is truncated or not a safetensors file"),
        ("text_encoder/model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "model.safetensors is truncated or not"),
        ("unet", None, "unet is missing, and model_index.json names it"),
    ],
)
def test_error_for_a_damaged_folder_names_file_and_damage(
    tiny_sd: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    folder = damaged(tiny_sd, tmp_path / "pipeline", file, content)
    with pytest.raises(ConfigurationError, match=f"cannot be opened as a pipeline: .*{message}.*; copy or download it"):
        StableDiffusion(folder)


def test_non_finite_weights_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(ConfigurationError, match="not finite, the first in unet: conv_in.bias"):
        StableDiffusion(str(tmp_path / "pipeline"))


def test_missing_tensors_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.bias"]
    save_file(state, file)
    with pytest.raises(ConfigurationError, match="unet lacks 1 of its weights, such as conv_in.bias"):
        StableDiffusion(str(tmp_path / "pipeline"))
