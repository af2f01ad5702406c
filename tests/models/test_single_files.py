"""Single files in the layout of the original code, against the folders of the same pipelines."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    ChromaPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from diffusers.loaders import single_file_model
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CLIPTextModelWithProjection

import lightning_draft
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import (
    Chroma,
    Flux,
    Flux2Klein,
    Guidance,
    LoRA,
    Memory,
    PipelineModel,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    TextEncoding,
    ZImage,
)
from lightning_draft.models.loading import opener
from lightning_draft.models.lora_base import read_lora
from lightning_draft.weightless import without_weights
from tests import original_layouts
from tests.single_files import assert_printed_code_opens, assert_same_model, assert_same_weights, written
from tests.tiny_families import write
from tests.tiny_pipelines import perturb, text_config, write_sd3_pipeline


@pytest.fixture(scope="module")
def sd_file(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Stable Diffusion checkpoint."""
    state = original_layouts.stable_diffusion(StableDiffusionPipeline.from_pretrained(tiny_sd))
    return written(state, tmp_path_factory.mktemp("single") / "model.safetensors")


def test_a_stable_diffusion_file_is_the_folder(sd_file: str, tiny_sd: Path) -> None:
    """The architecture comes from a folder, as without a connection."""
    model = StableDiffusion(sd_file, lora=None, pretrained_config=str(tiny_sd))
    expected = StableDiffusion(str(tiny_sd), lora=None)
    assert_same_model(model, expected)
    mixed = StableDiffusion(
        sd_file, dtype="bfloat16", memory=Memory(vae_dtype="float32"), pretrained_config=str(tiny_sd)
    )
    assert torch.equal(mixed.vae.decoder.conv_in.weight, expected.vae.decoder.conv_in.weight)
    assert mixed.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_single_file_is_planned_from_its_header_and_configuration(
    sd_file: str, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `pretrained_config`, from the repository that diffusers has for its architecture."""
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", None)  # what reads the weights
    monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "v1", {"pretrained_model_name_or_path": str(tiny_sd)})
    with without_weights():
        expected = StableDiffusion(str(tiny_sd)).state_dict()
        for model in (StableDiffusion(sd_file, pretrained_config=str(tiny_sd)), StableDiffusion(sd_file)):
            found = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
            assert found == {name: (value.shape, value.dtype) for name, value in expected.items()}
            assert isinstance(model.unet.conv_in.weight.data, FakeTensor)


def test_a_lora_file_in_a_run_folder_finds_the_configuration_of_its_single_file(
    sd_file: str, tiny_sd: Path, tmp_path: Path
) -> None:
    """By the run's config, with and without the model given."""
    model = StableDiffusion(sd_file, pretrained_config=str(tiny_sd), lora=LoRA(rank=8))
    model.save_lora(tmp_path / "lora" / "last.safetensors", {"base": Path(sd_file).name})
    arguments = {"pretrained": sd_file, "pretrained_config": str(tiny_sd)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"model": {"init_args": arguments}}}}))
    for given in (None, sd_file):
        file = read_lora(tmp_path / "lora" / "last.safetensors", given)
        assert file.base.pretrained_config == str(tiny_sd)
        assert file.rank == 8
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"is not here.*write --model"):
        read_lora(tmp_path / "lora" / "last.safetensors")


def test_a_lora_file_in_a_run_folder_finds_the_omitted_networks_of_its_single_file(
    sd3_files: dict[str, str], large_sd3: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = {"pretrained_model_name_or_path": str(large_sd3)}
    monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "sd35_large", default)
    arguments: dict[str, Any] = {"pretrained": sd3_files["clips"], "omit": ["text_encoder_3"]}
    model = StableDiffusion3(**arguments, lora=LoRA(rank=1, target_modules=["to_q"]))
    model.save_lora(tmp_path / "last.safetensors", {"base": "sd3_clips.safetensors"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"model": {"init_args": arguments}}}}))
    for given in (None, sd3_files["clips"]):
        assert read_lora(tmp_path / "last.safetensors", given).rank == 1


def test_single_file_without_a_connection_needs_pretrained_config(sd_file: str) -> None:
    """If the architecture would have to come from the hub, the message names the alternative."""
    with pytest.raises(ConfigurationError, match="could not be opened .* without a connection, set pretrained_config"):
        StableDiffusion(sd_file)


def test_a_stable_diffusion_xl_file_is_the_folder(tiny_sdxl: Path, tmp_path: Path) -> None:
    """diffusers recognizes the family by the tenth layer of the second text encoder, whose width differs."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    torch.manual_seed(0)
    text = {"hidden_size": 20, "num_hidden_layers": 10, "projection_dim": 12, "hidden_act": "gelu"}
    encoder = CLIPTextModelWithProjection(text_config(pipeline.tokenizer, **text))
    pipeline.text_encoder_2 = perturb(encoder)
    pipeline.unet = perturb(UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 36}))
    pipeline.save_pretrained(tmp_path / "folder")
    state = original_layouts.stable_diffusion_xl(pipeline)
    file, expected = written(state, tmp_path / "xl.safetensors"), StableDiffusionXL(str(tmp_path / "folder"), lora=None)
    options: dict[str, Any] = {"lora": None, "pretrained_config": str(tmp_path / "folder")}
    assert opener(file) == "StableDiffusionXL"
    assert_same_model(StableDiffusionXL(file, **options), expected)
    second = {key: value for key, value in state.items() if not key.startswith("conditioner.embedders.0.")}
    file = written(second, tmp_path / "second.safetensors")
    assert_same_weights(StableDiffusionXL(file, **options), expected)
    with pytest.raises(ConfigurationError, match=r"has no text_encoder; set pretrained_config to .*"):
        StableDiffusionXL(file)


@pytest.fixture(scope="module")
def large_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow Stable Diffusion 3.5 large: diffusers recognizes it by its 38th layer, and each CLIP by its width."""
    folder = write_sd3_pipeline(tmp_path_factory.mktemp("sd3") / "sd3", num_layers=38, pooled_projection_dim=28)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    torch.manual_seed(0)
    words, gelu = pipeline.tokenizer, {"hidden_size": 20, "projection_dim": 12, "hidden_act": "gelu"}
    pipeline.text_encoder = perturb(CLIPTextModelWithProjection(text_config(words, projection_dim=16)))
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.text_encoder_2 = perturb(CLIPTextModelWithProjection(text_config(words, **gelu)))
    pipeline.text_encoder_3.half().float()  # published in float16
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd3_files(large_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Its files with all text encoders, with both CLIPs, and with none."""
    pipeline, folder = StableDiffusion3Pipeline.from_pretrained(large_sd3), tmp_path_factory.mktemp("single")
    encoders: dict[str, tuple[str, ...]] = {
        "all": ("clip_l", "clip_g", "t5xxl"),
        "clips": ("clip_l", "clip_g"),
        "none": (),
    }
    states = {name: original_layouts.stable_diffusion_3(pipeline, included) for name, included in encoders.items()}
    return {name: written(state, folder / f"sd3_{name}.safetensors") for name, state in states.items()}


@pytest.mark.parametrize(("name", "omit"), [("all", ()), ("clips", ()), ("none", ()), ("all", ("text_encoder_3",))])
def test_a_stable_diffusion_3_file_is_the_folder(
    sd3_files: dict[str, str], large_sd3: Path, name: str, omit: tuple[str, ...]
) -> None:
    """Text encoders that the file lacks come from `pretrained_config`."""
    options: dict[str, Any] = {"lora": None, "omit": omit}
    model = StableDiffusion3(sd3_files[name], pretrained_config=str(large_sd3), **options)
    expected = StableDiffusion3(str(large_sd3), **options)
    assert opener(sd3_files[name]) == "StableDiffusion3"
    assert_same_model(model, expected)
    assert (model.text_encoder_3 is None) == (model.pipeline.tokenizer_3 is None) == bool(omit)
    with without_weights():
        planned = StableDiffusion3(sd3_files[name], pretrained_config=str(large_sd3), **options).state_dict()
    assert {key: value.shape for key, value in planned.items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }


def test_omitted_networks_need_no_pretrained_config(
    sd3_files: dict[str, str], large_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each network that is absent is named, and `omit` where it helps."""
    with pytest.raises(ConfigurationError, match=r"has no text_encoder_3; set .* or omit: \[text_encoder_3\]$"):
        StableDiffusion3(sd3_files["clips"])
    with pytest.raises(ConfigurationError, match=r"has no text_encoder and no text_encoder_2 and no .*3.5-large$"):
        StableDiffusion3(sd3_files["none"])
    default = {"pretrained_model_name_or_path": str(large_sd3)}
    monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "sd35_large", default)
    options: dict[str, Any] = {"lora": None, "omit": ["text_encoder_3"]}
    assert_same_weights(StableDiffusion3(sd3_files["clips"], **options), StableDiffusion3(str(large_sd3), **options))
    with without_weights():
        StableDiffusion3(sd3_files["clips"], **options)


def test_a_pretrained_config_without_a_network_omits_it(
    sd3_files: dict[str, str], large_sd3: Path, tmp_path: Path
) -> None:
    """As a folder without this network does."""
    shutil.copytree(large_sd3, tmp_path / "folder")
    index = tmp_path / "folder" / "model_index.json"
    changes = dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None])
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    expected = StableDiffusion3(str(tmp_path / "folder"), lora=None)
    for name in ("all", "clips"):
        model = StableDiffusion3(sd3_files[name], lora=None, pretrained_config=str(tmp_path / "folder"))
        assert_same_weights(model, expected)
    with without_weights():
        StableDiffusion3(sd3_files["clips"], pretrained_config=str(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["all", "none"])
@pytest.mark.parametrize("vae_dtype", ["float16", "float32"])
def test_in_float16_the_layers_of_the_t5_that_overflow_are_float32(
    sd3_files: dict[str, str], large_sd3: Path, name: str, vae_dtype: Any
) -> None:
    options: dict[str, Any] = {"lora": None, "dtype": "float16", "memory": Memory(vae_dtype=vae_dtype)}
    model = StableDiffusion3(sd3_files[name], pretrained_config=str(large_sd3), **options)
    assert model.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert_same_weights(model, StableDiffusion3(str(large_sd3), **options))


def test_a_t5_in_a_file_has_one_embedding(sd3_files: dict[str, str], large_sd3: Path, tmp_path: Path) -> None:
    """Files contain it once or twice."""
    state, name = load_file(sd3_files["all"]), "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"
    del state[name]
    for file in (sd3_files["all"], written(state, tmp_path / "once.safetensors")):
        encoder = StableDiffusion3(file, lora=None, pretrained_config=str(large_sd3)).text_encoder_3
        assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
        assert not encoder.shared.weight.is_meta


def test_a_t5_may_be_in_float8(sd3_files: dict[str, str], large_sd3: Path, tmp_path: Path) -> None:
    """As in `sd3_medium_incl_clips_t5xxlfp8.safetensors`."""
    t5, state = "text_encoders.t5xxl.", load_file(sd3_files["all"])
    state |= {key: value.to(torch.float8_e4m3fn) for key, value in state.items() if key.startswith(t5)}
    file = written(state, tmp_path / "sd3.safetensors")
    encoder = StableDiffusion3(file, lora=None, pretrained_config=str(large_sd3)).text_encoder_3
    assert torch.equal(encoder.shared.weight, state[f"{t5}transformer.shared.weight"].float())


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("model.diffusion_model.out.2.bias", ""),
        ("first_stage_model.decoder.norm_out.bias", ""),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            ", such as text_encoder.*final_layer_norm.bias",
        ),
    ],
)
def test_a_file_that_lacks_a_weight_is_rejected(
    sd_file: str, tiny_sd: Path, tmp_path: Path, key: str, shown: str
) -> None:
    """Otherwise this weight would have no values."""
    state = load_file(sd_file)
    del state[key]
    file = written(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=f"model.safetensors lacks weights{shown}; copy or download"):
        StableDiffusion(file, pretrained_config=str(tiny_sd))


def with_width(monkeypatch: pytest.MonkeyPatch, transformer: str) -> None:
    """Change the width in diffusers' converter, which has that of the published models built in, to 32."""
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[transformer]
    convert = mapping["checkpoint_mapping_fn"]
    code = inspect.getsource(convert)
    assert "inner_dim = 3072" in code
    names = dict(convert.__globals__)
    exec(code.replace("inner_dim = 3072", "inner_dim = 32"), names)
    monkeypatch.setitem(mapping, "checkpoint_mapping_fn", names[convert.__name__])


@pytest.fixture
def tiny_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small FLUX.1."""
    with_width(monkeypatch, "FluxTransformer2DModel")
    return write("flux", tmp_path / "flux")


@pytest.fixture
def tiny_chroma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Chroma."""
    with_width(monkeypatch, "ChromaTransformer2DModel")
    return write("chroma", tmp_path / "chroma")


@pytest.mark.parametrize("complete", [True, False])
def test_a_flux_file_is_the_folder(tiny_flux: Path, tmp_path: Path, complete: bool) -> None:
    """With all networks, as ComfyUI writes them, or with the transformer alone, as its authors do."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    state = original_layouts.flux(pipeline) if complete else original_layouts.flux_transformer(pipeline.transformer)
    file = written(state, tmp_path / "flux.safetensors")
    options: dict[str, Any] = {"lora": None, "height": 16, "width": 16, "guidance": Guidance(1.0, embedded=2.0)}
    model = Flux(file, pretrained_config=str(tiny_flux), **options)
    assert opener(file) == "Flux"
    assert_same_model(model, Flux(str(tiny_flux), **options))


@pytest.mark.parametrize("complete", [True, False])
def test_a_chroma_file_is_the_folder(tiny_chroma: Path, tmp_path: Path, complete: bool) -> None:
    """With all networks, or with the transformer alone, as its author writes them."""
    pipeline = ChromaPipeline.from_pretrained(tiny_chroma)
    layout = original_layouts
    state = layout.chroma(pipeline) if complete else layout.chroma_transformer(pipeline.transformer)
    file = written(state, tmp_path / "chroma.safetensors")
    options: dict[str, Any] = {"lora": None, "height": 16, "width": 16}
    assert opener(file) == "Chroma"
    assert_same_model(Chroma(file, pretrained_config=str(tiny_chroma), **options), Chroma(str(tiny_chroma), **options))
    with without_weights():
        planned = Chroma(file, pretrained_config=str(tiny_chroma), **options)
    assert planned.transformer.proj_out.weight.shape == pipeline.transformer.proj_out.weight.shape
    if not complete:
        with pytest.raises(ConfigurationError, match="has no vae and no text_encoder; set pretrained_config to a"):
            Chroma(file)


def test_a_pretrained_config_of_another_architecture_is_rejected(
    tiny_flux: Path, sd3_files: dict[str, str], large_sd3: Path, tmp_path: Path
) -> None:
    """Also if only the guidance scale is missing, whose weights diffusers would drop."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    file = written(original_layouts.flux_transformer(pipeline.transformer), tmp_path / "flux.safetensors")
    shutil.copytree(tiny_flux, tmp_path / "schnell")
    config = tmp_path / "schnell" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": False}))
    message = r"is a model with a guidance scale as an input, and .* one without; .* such as .*FLUX.1-dev$"
    with pytest.raises(ConfigurationError, match=message):
        Flux(file, pretrained_config=str(tmp_path / "schnell"), height=16, width=16)
    shutil.copytree(large_sd3, tmp_path / "wide")
    config = tmp_path / "wide" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 39}))
    for other in ("wide", "nowhere"):
        message = rf"could not be opened with pretrained_config=.*{other} \(.*\); give .* such as .*3.5-large$"
        with pytest.raises(ConfigurationError, match=message):
            StableDiffusion3(sd3_files["all"], pretrained_config=str(tmp_path / other))


def test_flux_and_chroma_are_distinguished(tiny_flux: Path, tiny_chroma: Path, tmp_path: Path) -> None:
    """Files, and the pipelines of `pretrained_config`."""
    flux = original_layouts.flux_transformer(FluxPipeline.from_pretrained(tiny_flux).transformer)
    chroma = original_layouts.chroma_transformer(ChromaPipeline.from_pretrained(tiny_chroma).transformer)
    flux_file, chroma_file = written(flux, tmp_path / "f.safetensors"), written(chroma, tmp_path / "c.safetensors")
    with pytest.raises(ConfigurationError, match=r"is a chroma checkpoint and not one of FLUX.1; open it with Chroma$"):
        Flux(chroma_file)
    with pytest.raises(ConfigurationError, match=r"is a flux-dev checkpoint and not one of Chroma; open it with Flux$"):
        Chroma(flux_file)
    with pytest.raises(ConfigurationError, match=r"pretrained_config=.* is a FluxPipeline and not a ChromaPipeline"):
        Chroma(chroma_file, pretrained_config=str(tiny_flux))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux_2_dev_is_not_taken_for_klein(tmp_path: Path, prefix: str) -> None:
    """Both have the same layers; only dev has its guidance scale as an input."""
    keys = [f"{prefix}single_stream_modulation.lin.weight", f"{prefix}guidance_in.in_layer.weight"]
    dev = written(dict.fromkeys(keys, torch.zeros(2, 2)), tmp_path / "dev.safetensors")
    klein = written({keys[0]: torch.zeros(2, 2)}, tmp_path / "klein.safetensors")
    assert (opener(dev), opener(klein)) == (None, "Flux2Klein")
    with pytest.raises(
        ConfigurationError, match=r"a flux-2-dev checkpoint and not one of FLUX.2 Klein; flux-2-dev is not "
    ):
        Flux2Klein(dev)
    with pytest.raises(ConfigurationError, match="flux-2-klein checkpoint and not one of FLUX.1; open it with Flux2K"):
        Flux(klein)


def test_a_file_with_keys_of_a_model_and_other_shapes_is_no_checkpoint(tmp_path: Path) -> None:
    """diffusers looks for further keys of it."""
    key = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    file = written({key: torch.zeros(9216)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="is not a checkpoint of a known model"):
        StableDiffusion3(file)


@pytest.mark.parametrize("name", ["all", "clips", "none"])
@pytest.mark.parametrize("omit", [(), ("text_encoder_3",)])
def test_the_printed_code_opens_the_file_in_diffusers(
    sd3_files: dict[str, str], large_sd3: Path, name: str, omit: tuple[str, ...], tmp_path: Path
) -> None:
    """With the networks that it lacks, which have other weights in the file than in `pretrained_config`."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(large_sd3)
    for network in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        perturb(getattr(pipeline, network))
    pipeline.save_pretrained(tmp_path / "other")
    options: dict[str, Any] = {"lora": LoRA(rank=2), "omit": omit}
    model = StableDiffusion3(sd3_files[name], pretrained_config=str(tmp_path / "other"), **options)
    assert_printed_code_opens(model, tmp_path)


@pytest.mark.parametrize("name", ["all", "clips", "none"])
def test_cached_embeddings_of_a_single_file_are_those_of_its_encoders(
    sd3_files: dict[str, str], large_sd3: Path, name: str, tmp_path: Path
) -> None:
    """And another file has embeddings of its own."""
    options: dict[str, Any] = {"lora": None, "pretrained_config": str(large_sd3)}
    expected = StableDiffusion3(sd3_files[name], **options).encode(["a cat", "a dog"])
    model = StableDiffusion3(sd3_files[name], text=TextEncoding(cache=str(tmp_path)), **options)
    assert model.text_encoder is None
    model.precompute(["a cat"])
    found = model.encode(["a cat", "a dog"])
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())
    with without_weights():
        StableDiffusion3(sd3_files[name], text=TextEncoding(cache=str(tmp_path)), **options).precompute(["a cat"])
    state = load_file(sd3_files[name])
    other = written({**state, "one_more": torch.zeros(1)}, tmp_path / "other.safetensors")
    StableDiffusion3(other, text=TextEncoding(cache=str(tmp_path)), **options).encode(["a cat"])
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2


def test_a_z_image_file_is_the_folder(tmp_path: Path) -> None:
    """Its text encoder is not read from the file: diffusers cannot convert it."""
    folder = write("z_image", tmp_path / "z_image")
    pipeline = ZImagePipeline.from_pretrained(folder)
    state = original_layouts.z_image_transformer(pipeline.transformer)
    state["text_encoders.qwen3_4b.transformer.model.norm.weight"] = torch.zeros(1)
    file = written(state, tmp_path / "z_image.safetensors")
    options: dict[str, Any] = {"lora": None, "height": 16, "width": 16, "guidance": Guidance(1.0)}
    assert opener(file) == "ZImage"
    assert_same_model(ZImage(file, pretrained_config=str(folder), **options), ZImage(str(folder), **options))
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert_same_weights(
        ZImage(file, pretrained_config=str(tmp_path / "fp16"), **options), ZImage(str(folder), **options)
    )


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight_scale",
        "joint_blocks.0.x_block.attn.proj.scale_weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.comfy_quant",
    ],
)
def test_scales_of_quantized_weights_that_would_be_ignored_are_rejected(
    sd3_files: dict[str, str], large_sd3: Path, tmp_path: Path, key: str
) -> None:
    """Unless they are of a text encoder that is not read."""
    file = written({**load_file(sd3_files["all"]), key: torch.ones(1)}, tmp_path / "sd3.safetensors")
    options: dict[str, Any] = {"lora": None, "pretrained_config": str(large_sd3)}
    with pytest.raises(ConfigurationError, match=f"quantized weights with scales, such as {key}, which diffusers does"):
        StableDiffusion3(file, **options)
    if key.startswith("text_encoders."):
        StableDiffusion3(file, omit=["text_encoder_3"], **options)


def test_networks_that_a_file_lacks_need_pretrained_config(tiny_flux: Path, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    file = written(original_layouts.flux_transformer(pipeline.transformer), tmp_path / "flux.safetensors")
    with pytest.raises(
        ConfigurationError, match="has no vae and no text_encoder and no text_encoder_2; set pretrained_config to a"
    ):
        Flux(file)


LAYOUTS: dict[str, str | tuple[str, ...]] = {
    "StableDiffusion": "model.diffusion_model.input_blocks.0.0.weight",
    "StableDiffusionXL": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
    "StableDiffusion3": "model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight",
    "Flux": "double_blocks.0.img_attn.norm.key_norm.scale",
    "Flux2Klein": "single_stream_modulation.lin.weight",
    "Chroma": "distilled_guidance_layer.in_proj.bias",
    "Sana": "blocks.0.cross_attn.q_linear.weight",
    "ZImage": "layers.0.adaLN_modulation.0.weight",
    "PixArtSigma": ("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight"),
    "QwenImage": (
        "model.diffusion_model.transformer_blocks.0.img_mod.1.weight",
        "model.diffusion_model.txt_norm.weight",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_right_class_is_named_for_a_single_file_of_another_family(name: str, tmp_path: Path) -> None:
    keys = LAYOUTS[name]
    file = written(
        dict.fromkeys((keys,) if isinstance(keys, str) else keys, torch.zeros(2, 4, 3, 3)),
        tmp_path / "model.safetensors",
    )
    family = getattr(lightning_draft, name).family
    opened = "a pipeline folder of it" if family.single_file is None else "it"
    for other in {StableDiffusion, StableDiffusionXL, lightning_draft.Sana} - {getattr(lightning_draft, name)}:
        with pytest.raises(ConfigurationError, match=f"checkpoint and not one of .*; open {opened} with {name}$"):
            other(file)
    if family.single_file is None:
        with pytest.raises(ConfigurationError, match=f"single files of {family.title} usually lack the text encoders"):
            getattr(lightning_draft, name)(file)


def test_a_lora_is_no_single_file_of_a_model(tiny_sd: Path, tmp_path: Path) -> None:
    StableDiffusion(str(tiny_sd)).save_lora(tmp_path / "lora.safetensors")
    assert opener(str(tmp_path / "lora.safetensors")) is None
    with pytest.raises(ConfigurationError, match=r"lora.safetensors is not a checkpoint .* LoRA file is for lora.init"):
        StableDiffusion(str(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("kind", "fixture", "variant", "names"),
    [
        (StableDiffusionXL, "tiny_sdxl", "fp16", "*.fp16-0*.safetensors"),
        (StableDiffusion3, "tiny_sd3", None, "*model-0*.safetensors"),
    ],
)
def test_sharded_folders_and_fp16_variants_have_the_same_weights(
    kind: Callable[..., PipelineModel],
    fixture: str,
    variant: str | None,
    names: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Each network is in several files."""
    folder, options = request.getfixturevalue(fixture), {"dtype": "float16", "memory": Memory(vae_dtype="float16")}
    model = kind(str(folder), lora=None, **options)
    pipeline = model.family.pipeline_class.from_pretrained(folder, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant=variant, max_shard_size="4KB")
    for part in (model.family.denoiser, "text_encoder"):
        assert len(list((tmp_path / "half" / part).glob(names))) > 1
    assert_same_weights(kind(str(tmp_path / "half"), lora=None, **options), model)
