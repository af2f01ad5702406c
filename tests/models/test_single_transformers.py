"""Single files of families whose pipelines diffusers opens from folders alone: only the transformer is read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.model_card import write_card
from lightning_draft.models import Flux2Klein, LoRA, Memory, QwenImage, TextEncoding
from lightning_draft.models.loading import opener
from lightning_draft.weightless import without_weights
from tests import original_layouts
from tests.single_files import assert_printed_code_opens, assert_same_model, assert_same_weights, written
from tests.tiny_families import write

SMALL: dict[str, Any] = {"lora": None, "height": 16, "width": 16}
TRANSFORMERS: dict[str, tuple[Any, Any, Callable[[Any], dict[str, Tensor]]]] = {
    "flux_2_klein": (Flux2Klein, Flux2Transformer2DModel, original_layouts.flux_2_transformer),
    "qwen_image": (QwenImage, QwenImageTransformer2DModel, original_layouts.qwen_image_transformer),
}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def transformer_alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, str]:
    """A model class whose pipeline diffusers opens from folders alone, a folder, and a file with its transformer."""
    kind, network, layout = TRANSFORMERS[request.param]
    place = tmp_path_factory.mktemp("single")
    folder = write(request.param, place / "folder")
    state = layout(network.from_pretrained(folder, subfolder="transformer"))
    return kind, str(folder), written(state, place / "transformer.safetensors")


@pytest.fixture(params=["authors", "comfy"])
def transformer_file(request: pytest.FixtureRequest, transformer_alone: tuple[Any, str, str], tmp_path: Path) -> str:
    """The file as its authors write it, and as ComfyUI writes all networks of a pipeline."""
    file = transformer_alone[2]
    if request.param == "authors":
        return file
    state = {f"model.diffusion_model.{key}": value for key, value in load_file(file).items()}
    others = dict.fromkeys(["vae.decoder.conv_in.bias", "text_encoders.qwen.norm.weight"], torch.zeros(1))
    return written({**state, **others}, tmp_path / "comfy.safetensors")


def test_a_transformer_alone_is_the_folder(transformer_alone: tuple[Any, str, str], transformer_file: str) -> None:
    """The other networks come from `pretrained_config`, also if the file has them; a plan reads the header."""
    kind, folder, _ = transformer_alone
    expected = kind(folder, **SMALL)
    assert opener(transformer_file) == kind.__name__
    assert_same_model(kind(transformer_file, pretrained_config=folder, **SMALL), expected)
    mixed = {"dtype": "bfloat16", "memory": Memory(vae_dtype="float32"), **SMALL}
    model = kind(transformer_file, pretrained_config=folder, **mixed)
    assert_same_weights(model, kind(folder, **mixed))
    with without_weights():
        planned = kind(transformer_file, pretrained_config=folder, **mixed).state_dict()
    assert {name: (value.shape, value.dtype) for name, value in planned.items()} == {
        name: (value.shape, value.dtype) for name, value in model.state_dict().items()
    }
    with pytest.raises(ConfigurationError, match="has no vae and no text_encoder; set pretrained_config to a complete"):
        kind(transformer_file)


def test_a_transformer_alone_may_be_in_float8(transformer_alone: tuple[Any, str, str], tmp_path: Path) -> None:
    kind, folder, file = transformer_alone
    state = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}
    half = written({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    models = [
        kind(each, pretrained_config=folder, **SMALL) for each in (written(state, tmp_path / "8.safetensors"), half)
    ]
    assert_same_weights(*models)


def test_the_printed_code_opens_a_transformer_alone(
    transformer_alone: tuple[Any, str, str], transformer_file: str, tmp_path: Path
) -> None:
    kind, folder, _ = transformer_alone
    assert_printed_code_opens(kind(transformer_file, pretrained_config=folder, **{**SMALL, "lora": LoRA(2)}), tmp_path)


def test_the_card_opens_a_transformer_alone(
    transformer_alone: tuple[Any, str, str], transformer_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names without local folders."""
    kind, folder, _ = transformer_alone
    model = kind(transformer_file, pretrained_config=folder, **{**SMALL, "lora": LoRA(2)})
    base = Path(transformer_file).name
    text = write_card(model, tmp_path / "lora" / "best.safetensors", {"base": base}, comfy=False)
    assert str(tmp_path) not in text
    assert folder not in text
    code = text.partition("```python\n")[2].partition("pipe.load_lora_weights")[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "folder")
    if not Path(base).exists():
        shutil.copy(transformer_file, base)
    names: dict[str, Any] = {}
    exec(code, names)
    own = {key: value for key, value in model.transformer.state_dict().items() if "lora_" not in key}
    values = {key.replace(".base_layer", ""): value for key, value in own.items()}
    assert all(torch.equal(value, values[key]) for key, value in names["pipe"].transformer.state_dict().items())


def test_cached_embeddings_of_a_transformer_alone_are_those_of_the_folder(
    transformer_alone: tuple[Any, str, str], tmp_path: Path
) -> None:
    kind, folder, file = transformer_alone
    expected = kind(folder, **SMALL).encode(["a cat"])
    model = kind(file, pretrained_config=folder, text=TextEncoding(cache=str(tmp_path)), **SMALL)
    assert model.text_encoder is None
    found = model.encode(["a cat"])
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())
    assert all(map(torch.equal, found.ragged.get("text", ()), expected.ragged.get("text", ())))


def test_a_transformer_that_lacks_a_weight_or_is_of_another_size_is_rejected(
    transformer_alone: tuple[Any, str, str], tmp_path: Path
) -> None:
    kind, folder, file = transformer_alone
    state = load_file(file)
    name = next(key for key in state if key.startswith("txt_in."))
    less = written({key: value for key, value in state.items() if key != name}, tmp_path / "less.safetensors")
    with pytest.raises(ConfigurationError, match="less.safetensors lacks weights; copy or download it again"):
        kind(less, pretrained_config=folder, **SMALL)
    wide = written({**state, name: torch.zeros(3, 3)}, tmp_path / "wide.safetensors")
    with pytest.raises(ConfigurationError, match="could not be opened with pretrained_config=.* same architectur"):
        kind(wide, pretrained_config=folder, **SMALL)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigurationError, match=r"pretrained_config=.* is a FluxPipeline and not a"):
        kind(file, pretrained_config=str(tmp_path), **SMALL)
