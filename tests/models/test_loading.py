"""Pipelines in the forms that diffusers and others save them, and the table of families."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DModel
from jsonargparse import ArgumentParser
from torch import Tensor

import lightning_draft
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import DiffusionModel, Family, LoRA, PipelineModel, StableDiffusion
from lightning_draft.models.families import FAMILIES, Entry
from lightning_draft.models.loading import opener, public_name
from lightning_draft.schedules import VariancePreserving


def edited(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """Copy a pipeline and change one of its JSON files."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


def weights(model: StableDiffusion) -> dict[str, Tensor]:
    """All weights."""
    return dict(StableDiffusion.state_dict(model))


def assert_same_weights(ours: StableDiffusion, theirs: StableDiffusion) -> None:
    """Bitwise."""
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_schedule_equals_that_of_the_pipeline(tiny_sd: Path, tiny_sd_v: Path) -> None:
    epsilon, velocity = (StableDiffusion(str(folder), lora=None) for folder in (tiny_sd, tiny_sd_v))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 - betas).cumprod(0)
    schedule = epsilon.schedule
    assert isinstance(schedule, VariancePreserving)
    torch.testing.assert_close(torch.tensor(schedule.alphas_cumprod, dtype=torch.float64), table, rtol=1e-4, atol=0)
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0]
    assert (schedule.spacing, schedule.steps_offset, epsilon.prediction) == ("leading", 1, "epsilon")
    assert isinstance(velocity.schedule, VariancePreserving)
    assert (velocity.schedule.spacing, velocity.schedule.final_alpha_cumprod) == ("trailing", 1.0)
    assert velocity.prediction == "v_prediction"


def test_fp16_variant_is_used_if_there_is_no_other(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    model = StableDiffusion(str(tmp_path / "half"), lora=None)
    expected = StableDiffusion(str(tiny_sd), lora=None, dtype="float16")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert_same_weights(model.half(), expected)


def test_pickles_are_read_without_running_code(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    folder = tmp_path / "pickled"
    pipeline.save_pretrained(folder)
    for file in [*folder.glob("unet/*.safetensors"), *folder.glob("vae/*.safetensors")]:
        torch.save(getattr(pipeline, file.parent.name).state_dict(), file.with_suffix(".bin"))
        file.unlink()
    assert_same_weights(StableDiffusion(str(folder), lora=None), StableDiffusion(str(tiny_sd), lora=None))
    torch.save({"conv_in.weight": Path("/")}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        StableDiffusion(str(folder))


def test_clip_sample_is_disabled_as_in_diffusers(tiny_sd_v: Path, tmp_path: Path) -> None:
    """`StableDiffusionPipeline` disables clipping, because latents are not bounded by 1."""
    folder = edited(tiny_sd_v, tmp_path / "clip", "scheduler/scheduler_config.json", clip_sample=True)
    with pytest.warns(FutureWarning, match="clip_sample"):
        model = StableDiffusion(str(folder), lora=None)
    assert model.schedule == StableDiffusion(str(tiny_sd_v), lora=None).schedule


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"thresholding": True}, "removes a part of the gradient"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow' .* is not supported"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "rescale_betas_zero_snr=True with prediction_type=epsilon: .* set rescale_betas_zero_snr to false",
        ),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "FlowMatchEulerDiscreteScheduler has no alphas_cumprod; replace its config by that of a DDIMScheduler",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline and not"),
        (
            "model_index.json",
            {"_class_name": ["pipeline", "Mine"]},
            "needs a pipeline class from its own repository, whose code is not run",
        ),
        ("vae/config.json", {"latent_channels": 4, "scaling_factor": 1.0}, None),
    ],
)
def test_unsupported_pipelines_are_rejected(
    tiny_sd_v: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str | None
) -> None:
    folder = edited(tiny_sd_v, tmp_path / "pipeline", file, **changes)
    if message is None:
        StableDiffusion(str(folder))
        return
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(folder))


def test_networks_with_other_inputs_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    for name, change in {"LCM": {"time_cond_proj_dim": 8}, "class labels": {"num_class_embeds": 3}}.items():
        config = {**pipeline.unet.config, **change}
        pipeline.unet = type(pipeline.unet).from_config(config)
        pipeline.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"not a plain text-to-image .*{name}"):
            StableDiffusion(str(tmp_path / name))


def test_schedule_is_the_same_for_other_scheduler_classes(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "ddim")
    assert StableDiffusion(str(tmp_path / "ddim")).schedule == StableDiffusion(str(tiny_sd)).schedule


def test_tiny_autoencoder_decodes_as_in_diffusers(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipeline.vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    pipeline.save_pretrained(tmp_path / "small")
    model = StableDiffusion(str(tmp_path / "small"), lora=None)
    assert model.image_size == (16, 16)
    latents = model.noise(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pt")
        torch.testing.assert_close(model.decode(latents).clamp(0, 1), theirs)


def test_denoiser_without_sample_size_needs_height_and_width(tiny_sd: Path, tmp_path: Path) -> None:
    folder = edited(tiny_sd, tmp_path / "pipeline", "unet/config.json", sample_size=None)
    with pytest.raises(ConfigurationError, match=r"sample_size is null\); set height and width"):
        StableDiffusion(str(folder))
    assert StableDiffusion(str(folder), height=16, width=24).latent_shape == (4, 8, 12)


def test_network_without_add_adapter_is_adapted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).requires_grad_(False)
    assert not hasattr(network, "add_adapter")
    x = torch.randn(1, 3, 8, 8)
    before = network(x, 5).sample
    LoRA(2, seed=0).attach(network)
    torch.testing.assert_close(network(x, 5).sample, before)
    assert {name.split(".")[-3] for name, p in network.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


# The table of families.


class OfAnotherPackage(PipelineModel):
    """A family defined by a user: the networks of Stable Diffusion with another pipeline class."""

    family = Family(
        pipeline="StableDiffusionPAGPipeline",
        title="PAG pipelines",
        example="somebody/something",
        denoiser="unet",
        text_encoders=("text_encoder",),
        guidance_scale=2.0,
        unused=StableDiffusion.family.unused,
    )
    _configure = StableDiffusion._configure
    _embed = StableDiffusion._embed
    _network = StableDiffusion._network


@pytest.fixture
def own_family(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of the user's family, which is registered with one line."""
    monkeypatch.setitem(FAMILIES, "OfAnotherPackage", Entry(__name__, ("StableDiffusionPAGPipeline",)))
    return edited(tiny_sd, tmp_path / "own", "model_index.json", _class_name="StableDiffusionPAGPipeline")


def test_one_line_in_the_table_makes_a_family_public_suggested_and_parsed(own_family: Path) -> None:
    assert lightning_draft.OfAnotherPackage is lightning_draft.models.OfAnotherPackage is OfAnotherPackage
    assert opener(str(own_family)) == "OfAnotherPackage"
    with pytest.raises(ConfigurationError, match="open it with OfAnotherPackage"):
        StableDiffusion(str(own_family))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusionModel, "model")
    options = ["--model=OfAnotherPackage", f"--model.pretrained={own_family}", "--model.guidance.scale=3"]
    model = parser.instantiate(parser.parse_args(options)).model
    assert isinstance(model, OfAnotherPackage)
    assert model.guidance.scale == 3


def test_family_can_be_defined_outside_the_package(own_family: Path, tmp_path: Path) -> None:
    model = OfAnotherPackage(str(own_family))
    assert model.guidance.scale == 2.0
    model.save_lora(tmp_path / "lora.safetensors")
    model.load_lora(tmp_path / "lora.safetensors")


def test_the_table_names_the_pipeline_of_every_family() -> None:
    """Each class opens its own pipeline class and no entry names that of another."""
    for name, entry in FAMILIES.items():
        family = getattr(lightning_draft, name).family
        assert family.pipeline in entry.pipelines
        assert all(hasattr(diffusers, pipeline) for pipeline in entry.pipelines)
    pipelines = [pipeline for entry in FAMILIES.values() for pipeline in entry.pipelines]
    assert len(pipelines) == len(set(pipelines))


def test_the_table_imports_no_model() -> None:
    code = "import sys, lightning_draft.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("pretrained", "name"),
    [
        ("emoji64", "emoji64"),
        ("runwayml/some-model", "runwayml/some-model"),
        ("/home/me/models/mine", "mine"),
        ("/home/me/mine.safetensors", "mine.safetensors"),
        ("~/mine", "mine"),
        ("/home/me/.cache/huggingface/hub/models--org--a--b/snapshots/0a1b", "org/a--b"),
    ],
)
def test_public_names_have_no_local_folder(pretrained: str, name: str) -> None:
    assert public_name(pretrained) == name
