"""Nothing that a user downloads runs code, and nothing secret or active reaches files, logs or the terminal."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_draft.cli.checkpoint_file import find_checkpoint
from lightning_draft.cli.messages import print_error
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.redaction import redact
from lightning_draft.rewards import CLIPScore
from lightning_draft.rewards.weights import read_tensors

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"


class _Payload:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.mark),)


def _torch_file(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"a": _Payload(mark)}, "global_step": 1}, path)


def _plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"a": _Payload(mark)}))


@pytest.mark.parametrize("write", [_torch_file, _plain_pickle])
@pytest.mark.parametrize("read", [find_checkpoint, read_tensors])
def test_pickles_do_not_run_code_when_they_are_read(tmp_path: Path, write: Callable, read: Callable) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "ran"
    write(path, mark)
    with suppress(ConfigurationError):
        read(str(path) if read is find_checkpoint else path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if write is _torch_file else pickle.loads(path.read_bytes())
    assert mark.exists()  # the payload works


def test_pickled_weights_of_a_pipeline_do_not_run_code(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    _torch_file(folder / "unet" / "diffusion_pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(ConfigurationError, match="unet"):
        StableDiffusion(str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_in_a_pipeline_folder_does_not_run(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    code = CODE.format(mark=str(tmp_path / "ran")) + "from diffusers import UNet2DConditionModel as Net\n"
    for place in (folder / "mine.py", folder / "unet" / "mine.py", folder / "pipeline.py"):
        place.write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    for changed in ({**index, "unet": ["mine", "Net"]}, {**index, "_class_name": ["pipeline", "Net"]}):
        (folder / "model_index.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigurationError, match=r"model"):
            StableDiffusion(str(folder))
        assert not (tmp_path / "ran").exists()


def test_code_in_the_folder_of_a_reward_model_does_not_run(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    (folder / "mine.py").write_text(CODE.format(mark=str(tmp_path / "ran")) + "class Net: pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        auto = {"AutoConfig": "mine.Net", "AutoModel": "mine.Net", "AutoTokenizer": ["mine.Net", None]}
        file.write_text(json.dumps({**content, "auto_map": auto}))
    with suppress(ConfigurationError):
        CLIPScore(str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_in_the_folder_of_a_data_set_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "prompts.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    with pytest.raises(ConfigurationError, match="could not be read"):
        read_prompts(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["--rewards", "--config"])
def test_tags_in_yaml_do_not_run_code(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_draft.__main__ import main

    file, mark = tmp_path / "a.yaml", tmp_path / "ran"
    file.write_text(f"model: !!python/object/apply:pathlib.Path.touch [{{mark: {mark}}}]\n")
    command = ["score", str(tmp_path)] if option == "--rewards" else ["sample"]
    assert main([*command, option, str(file)]) == 2
    assert "python/object/apply" in capsys.readouterr().err
    assert not mark.exists()


def test_the_header_of_a_lora_file_is_not_followed(tiny_sd: Path, tmp_path: Path) -> None:
    """A file may name any base model; a folder that it names is read as data."""
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(ConfigurationError, match="a.safetensors"):
        StableDiffusion(str(tiny_sd)).load_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"url": "https://host/?access_token=SECRET"},
        {"url": "https://SECRET@host/"},
        {"headers": {"X-Api-Key": "SECRET"}},
        {"hf_token": "SECRET"},
        {"nested": [{"client_secret": "SECRET"}]},
        {"AWS_SECRET_ACCESS_KEY": "SECRET"},
        {"passphrase": "SECRET"},
        {"headers": {"Cookie": "SECRET"}},
        {"bearer": "SECRET"},
    ],
)
def test_secrets_are_removed_from_what_is_saved(options: dict[str, Any]) -> None:
    assert "SECRET" not in str(redact(options)).replace("SECRET_ACCESS", "")


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\x1b[2J", "a\rb", "\u202eabc", "\x9b31m", "a\x08b", "\u2066x"])
def test_messages_hold_no_terminal_control_characters(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"there is no file {text}")
    shown = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in shown)
