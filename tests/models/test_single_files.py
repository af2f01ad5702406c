"""Single files in the layout of the original code, against the folders of the same pipelines."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from diffusers.loaders import single_file_model
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CLIPTextModelWithProjection

import lightning_draft
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import (
    Flux,
    Guidance,
    LoRA,
    Memory,
    PipelineModel,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
)
from lightning_draft.models.loading import opener
from lightning_draft.models.lora_base import read_lora
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.weightless import without_weights
from tests import original_layouts
from tests.tiny_families import write
from tests.tiny_pipelines import perturb, text_config


def written(state: dict[str, Tensor], file: Path) -> str:
    """Write a checkpoint and return its name."""
    save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, file)
    return str(file)


def assert_same_weights(ours: PipelineModel, theirs: PipelineModel) -> None:
    """Bitwise."""
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@torch.no_grad()
def image(model: PipelineModel) -> Tensor:
    """An image of two steps."""
    sampler = FlowEuler(2) if model.prediction == "flow" else DDIM(2)
    chain = SamplingChain(model, sampler, model.encode(["a red cat"]))
    return model.decode(chain.advance(chain.start(model.noise(1, torch.Generator().manual_seed(0)))).x)


def assert_same_model(ours: PipelineModel, theirs: PipelineModel) -> None:
    """Weights, schedule and image."""
    assert_same_weights(ours, theirs)
    assert (ours.schedule, ours.prediction) == (theirs.schedule, theirs.prediction)
    torch.testing.assert_close(image(ours), image(theirs), rtol=0, atol=2e-6)


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
    file = written(original_layouts.stable_diffusion_xl(pipeline), tmp_path / "xl.safetensors")
    model = StableDiffusionXL(file, lora=None, pretrained_config=str(tmp_path / "folder"))
    assert opener(file) == "StableDiffusionXL"
    assert_same_model(model, StableDiffusionXL(str(tmp_path / "folder"), lora=None))


@pytest.fixture
def tiny_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small FLUX.1, and diffusers' converter with its width, which has that of the published models built in."""
    folder = write("flux", tmp_path / "flux")
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = mapping["checkpoint_mapping_fn"]
    code = inspect.getsource(convert)
    assert "inner_dim = 3072" in code
    names = dict(convert.__globals__)
    exec(code.replace("inner_dim = 3072", "inner_dim = 32"), names)
    monkeypatch.setitem(mapping, "checkpoint_mapping_fn", names[convert.__name__])
    return folder


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


def test_a_z_image_file_is_the_folder(tmp_path: Path) -> None:
    """With the transformer alone."""
    folder = write("z_image", tmp_path / "z_image")
    pipeline = ZImagePipeline.from_pretrained(folder)
    file = written(original_layouts.z_image_transformer(pipeline.transformer), tmp_path / "z_image.safetensors")
    options: dict[str, Any] = {"lora": None, "height": 16, "width": 16, "guidance": Guidance(1.0)}
    assert opener(file) == "ZImage"
    assert_same_model(ZImage(file, pretrained_config=str(folder), **options), ZImage(str(folder), **options))


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
