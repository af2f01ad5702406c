"""Prompt embeddings on the disk equal those of the loaded encoders, for several processes and after kills."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_draft import models
from lightning_draft.cli import app, shipped
from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.process import process_arguments
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import StableDiffusion, StableDiffusion3, TextEncoding, text_store
from lightning_draft.models.base import Conditioning
from lightning_draft.models.loading import opener
from lightning_draft.models.text_store import TextStore
from lightning_draft.weightless import without_weights
from tests.tiny_families import write
from tests.tiny_pipelines import write_sd3_pipeline

PROMPTS = ["a cat", "a red dog", "a house"]


def opened(folder: Path, cache: Path | None, **options: Any) -> StableDiffusion:
    text = TextEncoding(cache=None if cache is None else str(cache), **options)
    return StableDiffusion(str(folder), lora=None, text=text)


def tensors(conditioning: Conditioning) -> list[Tensor]:
    assert conditioning.negative is not None
    return [*conditioning.tensors.values(), *conditioning.negative.tensors.values()]


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that records for each loading of text encoders whether the denoiser has weights."""
    loads: list[bool] = []
    load = StableDiffusion._load_text_encoders

    def counted(model: StableDiffusion, device: Any) -> None:
        loads.append(not isinstance(next(model.unet.parameters()), FakeTensor))
        load(model, device)

    monkeypatch.setattr(StableDiffusion, "_load_text_encoders", counted)
    return loads


def test_embeddings_equal_those_of_loaded_encoders(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, expected = count_loads(monkeypatch), opened(tiny_sd, None).encode(PROMPTS)
    model = opened(tiny_sd, tmp_path)
    assert model.text_encoder is None
    model.precompute(PROMPTS[:2])
    for each in (model, opened(tiny_sd, tmp_path)):
        found = each.encode(PROMPTS)  # the third one is embedded by the first model
        assert all(map(torch.equal, tensors(found), tensors(expected)))
        assert each.text_encoder is None
        assert each.pipeline.text_encoder is None
    assert loads == [True, True]


@pytest.mark.parametrize("family", ["flux", "sana", "z_image"])
def test_embeddings_of_other_families_equal_those_of_loaded_encoders(family: str, tmp_path: Path) -> None:
    folder = str(write(family, tmp_path / "model"))
    kind = getattr(models, str(opener(folder)))
    both = [kind(folder, lora=None, text=TextEncoding(cache=each)) for each in (None, str(tmp_path / "cache"))]
    both[1].precompute(PROMPTS)
    plain, cached = (model.encode(PROMPTS) for model in both)
    for name, expected in plain.tensors.items():
        assert torch.equal(cached.tensors[name], expected)
    for name, several in plain.ragged.items():
        assert all(map(torch.equal, cached.ragged[name], several))


def test_a_disk_without_space_for_all_prompts_is_refused_after_the_first_one(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is embedded stays; a tiny encoder's embedding of a prompt takes a few KiB."""
    monkeypatch.setattr(text_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**14))
    model = opened(tiny_sd, tmp_path)
    with pytest.raises(ConfigurationError, match=r"text.cache=.* needs 0.0 GiB .*; write a folder on a larger"):
        model.precompute([f"prompt {number}" for number in range(100)])
    assert len(list(next(tmp_path.iterdir()).glob("*.safetensors"))) == 1
    model.precompute(PROMPTS[:1])


def test_progress_counts_the_texts_without_an_embedding(tiny_sd: Path, tmp_path: Path) -> None:
    """With the negative prompt."""
    calls: list[tuple[int, int]] = []
    opened(tiny_sd, tmp_path).precompute(PROMPTS[:1], progress=lambda *call: calls.append(call))
    opened(tiny_sd, tmp_path).precompute(PROMPTS, progress=lambda *call: calls.append(call))
    opened(tiny_sd, tmp_path).precompute(PROMPTS, progress=lambda *call: calls.append(call))
    assert calls == [(0, 2), (1, 2), (2, 2), (0, 2), (1, 2), (2, 2)]


def test_a_changed_encoder_or_dtype_has_embeddings_of_its_own(tiny_sd: Path, tmp_path: Path) -> None:
    folder, cache = copytree(tiny_sd, tmp_path / "model"), tmp_path / "cache"
    before = opened(folder, cache).encode(PROMPTS)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value * 1.1 if value.is_floating_point() else value for name, value in weights.items()}, file)
    found, expected = (opened(folder, each).encode(PROMPTS) for each in (cache, None))
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert not torch.equal(found.tensors["text"], before.tensors["text"])
    StableDiffusion(str(folder), lora=None, dtype="bfloat16", text=TextEncoding(cache=str(cache))).encode(PROMPTS)
    assert len(list(cache.iterdir())) == 3


def embed(folder: Path, numbers: range, delay: Any = None) -> None:
    store = TextStore(folder)
    with store.writing():
        for number in numbers:
            store.get(number, lambda number=number: {"text": torch.full((2**14,), number)}, "cpu")
            if delay is not None:
                delay(number)


def test_two_processes_and_a_killed_one_leave_every_embedding_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "SHARD", 2**19)
    context = get_context("fork")

    def kill(number: int) -> None:
        if number == 29:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = context.Process(target=embed, args=(tmp_path, range(30), kill))
    killed.start()
    killed.join()
    done = TextStore(tmp_path)
    assert 0 < sum(number in done for number in range(30)) < 30
    others = [context.Process(target=embed, args=(tmp_path, range(low, low + 25))) for low in (0, 15)]
    for process in others:
        process.start()
    for process in others:
        process.join()
        assert process.exitcode == 0
    store = TextStore(tmp_path)
    for number in range(40):
        assert torch.equal(store.get(number, dict, "cpu")["text"], torch.full((2**14,), number))
    assert not list(tmp_path.glob(".*partial*"))


def test_a_damaged_shard_is_named_and_embedded_again(tmp_path: Path) -> None:
    embed(tmp_path, range(3))
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=f"{shard.name} is damaged and not used"):
        store = TextStore(tmp_path)
    assert 0 not in store
    with store.writing():
        for number in range(3):
            store.get(number, lambda number=number: {"text": torch.full((2**14,), number)}, "cpu")
    assert all(number in store for number in range(3))
    assert torch.equal(TextStore(tmp_path).get(2, dict, "cpu")["text"], torch.full((2**14,), 2))


def test_changed_bytes_and_deleted_files_are_errors(tmp_path: Path) -> None:
    embed(tmp_path / "cache", range(3))
    (shard,) = (tmp_path / "cache").iterdir()
    store, content = TextStore(tmp_path / "cache"), shard.read_bytes()
    shard.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(ConfigurationError, match=rf"{shard.name} of text.cache .*checksum.*; delete it.*--resume auto"):
        [store.get(number, dict, "cpu") for number in range(3)]
    shard.unlink()
    with pytest.raises(ConfigurationError, match=rf"{shard.name} of text.cache cannot be read .*No such file"):
        store.get(0, dict, "cpu")
    shard.parent.rmdir()
    with store.writing():
        store.get(3, lambda: {"text": torch.ones(1)}, "cpu")
    assert 3 in TextStore(tmp_path / "cache")


def test_a_foreign_file_in_the_folder_is_named_and_not_used(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=r"lora.safetensors is damaged and not used .*no checksums"):
        TextStore(tmp_path)


@pytest.mark.parametrize("folder", ["", " ", "a\0b"])
def test_a_name_that_cannot_be_a_folder_is_rejected(folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"text.cache=.* is not the name of a folder; write"):
        TextEncoding(cache=folder)


def test_a_folder_that_cannot_be_created_is_an_error_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(
        ConfigurationError, match=r"text.cache: cannot write .*file/x: Not a directory; a part of the path is a file"
    ):
        TextStore(tmp_path / "file" / "x")


def test_fit_embeds_all_prompts_before_other_weights_are_read(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = count_loads(monkeypatch)
    monkeypatch.chdir(tmp_path)
    args = ["--model.reward", "ColorTarget", "--model", "DraftModule", "--model.model", "StableDiffusion"]
    args += ["--model.model.pretrained", str(tiny_sd), "--model.model.text.cache", "cache"]
    args += ["--model.sampler", "DDIM", "--model.sampler.num_steps", "2", "--data.prompts", '["a cat", "a dog"]']
    args += ["--data.val_prompts", '["a bird"]', "--data.batch_size", "1", "--trainer.max_steps", "1", "--name", "run"]
    args += ["--trainer.accelerator", "cpu", "--samples", "null"]
    assert app.run("fit", args) == 0
    assert loads == [False]


@pytest.mark.parametrize("words", [["--model.model.text.cache", "null"], ["--model.model.text={cache: null}"]])
def test_null_on_the_command_line_is_no_cache(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache.yaml").write_text("model: {init_args: {model: {init_args: {text: {cache: embeddings}}}}}")
    args = [
        "--config",
        str(shipped.locate("quickstart")),
        "--config",
        "cache.yaml",
        *words,
        "--model.model.pretrained",
        str(tiny_sd),
    ]
    with process_arguments(["fit", *args]):
        config = BuildCLI("fit").config["fit"]
    assert config["model"]["init_args"]["model"]["init_args"]["text"]["cache"] is None


def test_an_encoder_that_the_pipeline_lacks_needs_no_embeddings(tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(write_sd3_pipeline(tmp_path / "all"))
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.register_to_config(text_encoder_3=(None, None), tokenizer_3=(None, None))
    pipeline.save_pretrained(tmp_path / "without_t5")
    options: dict[str, Any] = {"lora": None, "height": 16, "width": 16}
    expected = StableDiffusion3(str(tmp_path / "without_t5"), **options).encode(PROMPTS)
    text = TextEncoding(cache=str(tmp_path / "cache"))
    found = StableDiffusion3(str(tmp_path / "without_t5"), text=text, **options).encode(PROMPTS)
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_a_folder_that_cannot_be_written_to_is_refused_before_prompts_are_embedded(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = count_loads(monkeypatch)
    model = opened(tiny_sd, tmp_path)
    monkeypatch.setattr(text_store.os, "access", lambda *_: False)
    with pytest.raises(ConfigurationError, match=r"text.cache: .* cannot be written to.*; write another folder"):
        model.precompute(PROMPTS)
    assert not loads


def test_without_weights_no_embedding_is_read_or_written(tiny_sd: Path, tmp_path: Path) -> None:
    with without_weights():
        model = opened(tiny_sd, tmp_path)
        model.precompute(PROMPTS)
        assert model.text_encoder is None
        assert (
            model.encode(PROMPTS).tensors["text"].shape == opened(tiny_sd, None).encode(PROMPTS).tensors["text"].shape
        )
    assert not list(tmp_path.iterdir())


def test_an_encoder_without_files_is_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    """Its embeddings could not be told from those of another one."""
    model = opened(tiny_sd, tmp_path)
    model.pipeline.tokenizer.name_or_path = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"the files of the text_encoder are not in .*; write null"):
        model.encode(PROMPTS)
