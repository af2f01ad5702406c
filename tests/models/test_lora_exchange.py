"""LoRA files for ComfyUI, with a part for text encoders, and as the start of training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.model_card import model_card
from lightning_draft.models import Guidance, LoRA, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lightning_draft.models.lora_base import read_lora
from lightning_draft.models.lora_merge import merge_lora
from lightning_draft.models.lora_names import original_unet_name
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scale_schedule import ScaleSchedule
from lightning_draft.samplers import DDIM, FlowEuler

PROMPTS = ["a red cat", "dog"]
LAYERS = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj", "downsamplers.0.conv"]
KINDS: dict[str, tuple[type[PipelineModel], Any]] = {
    "tiny_sd": (StableDiffusion, StableDiffusionPipeline),
    "tiny_sdxl": (StableDiffusionXL, StableDiffusionXLPipeline),
}


@pytest.fixture(autouse=True)
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 asks for a release of peft that does not exist yet before it adapts a text encoder."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


@pytest.fixture(params=KINDS)
def kind(request: Any) -> tuple[Path, type[PipelineModel], Any]:
    """Folder, model class and pipeline class."""
    return (request.getfixturevalue(request.param), *KINDS[request.param])


def noise(size: int) -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def images(model: PipelineModel) -> Tensor:
    """Clamped images."""
    chain = SamplingChain(model, DDIM(2), model.encode(PROMPTS))
    return model.decode(chain.advance(chain.start(noise(model.latent_shape[-1]))).x).clamp(0, 1)


def opened(folder: Path, model: type[PipelineModel], lora: LoRA | None = None) -> Any:
    return model(str(folder), lora=lora, guidance=Guidance(2.0))


def tuned(folder: Path, model: type[PipelineModel], lora: LoRA) -> Any:
    """A model whose adapters do something."""
    built = opened(folder, model, lora)
    generator = torch.Generator().manual_seed(3)
    for _, value in built.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return built


def plain(folder: Path, pipeline: Any, file: Path | None = None) -> Any:
    """What a user of diffusers has."""
    opened = pipeline.from_pretrained(folder)
    opened.scheduler = DDIMScheduler.from_config(opened.scheduler.config, clip_sample=False)
    opened.set_progress_bar_config(disable=True)
    if file is not None:
        opened.load_lora_weights(str(file))
    return opened


def pipeline_images(pipeline: Any, unet: Any = None) -> Tensor:
    latents = noise((unet or pipeline.unet).config.sample_size)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "latents": latents, "output_type": "pt"}
    options.update(dict.fromkeys(("height", "width"), 2 * len(latents[0, 0])))
    made: Tensor = pipeline(PROMPTS, **options).images
    return made


def test_comfy_file_gives_the_same_images_in_diffusers(kind: Any, tmp_path: Path) -> None:
    """Through diffusers' converter of kohya's names, for attention, feed-forward, residual and resampling layers."""
    folder, model_class, pipeline = kind
    model = tuned(folder, model_class, LoRA(2, alpha=3.0, target_modules=LAYERS))
    file = tmp_path / "best.comfy.safetensors"
    model.save_lora(file, {"base": "tiny"}, form="comfy")
    torch.testing.assert_close(pipeline_images(plain(folder, pipeline, file)), images(model), rtol=0, atol=2e-4)
    again = opened(folder, model_class)
    base = images(again)
    again.load_lora(file)
    torch.testing.assert_close(images(again), images(model), rtol=0, atol=1e-5)
    assert (images(model) - base).abs().mean() > 0.01


def test_comfy_file_has_alpha_and_the_fields_of_viewers(tiny_sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.comfy.safetensors"
    header = {"base": "tiny", "base_sha256": "ab" * 32, "reward": "Brightness()", "step": "12"}
    tuned(tiny_sd, StableDiffusion, LoRA(2, alpha=3.0)).save_lora(file, header, form="comfy")
    with safe_open(file, "pt") as content:
        keys, metadata = set(content.keys()), content.metadata()
        assert content.get_tensor(next(key for key in keys if key.endswith(".alpha"))) == 2.0
    stems = {key.partition(".")[0] for key in keys}
    assert keys == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    expected = {
        "reward": "Brightness()",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sd_v1",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_steps": "12",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    assert expected.items() <= metadata.items()
    assert "Brightness()" in metadata["ss_training_comment"]


def test_original_unet_names_are_those_of_diffusers_single_file_converter(tiny_sdxl: Path) -> None:
    """Every layer of the network, with the converter of complete checkpoints, which is independent of LoRA."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    state = unet.state_dict()
    original = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        original[f"model.diffusion_model.{original_unet_name(layer, unet.config)}.{kind}"] = value
    renamed = {"conv_norm_out": "out.0"}  # a norm, which no LoRA adapts
    original = {key.replace("conv_norm_out", renamed["conv_norm_out"]): value for key, value in original.items()}
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


def test_comfy_file_of_stable_diffusion_3_has_diffusers_names_and_alpha(tiny_sd3: Path, tmp_path: Path) -> None:
    model = tuned(tiny_sd3, StableDiffusion3, LoRA(2, alpha=3.0, target_modules=["to_q"]))
    model.save_lora(tmp_path / "best.comfy.safetensors", form="comfy")
    keys = load_file(tmp_path / "best.comfy.safetensors")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.alpha"} <= keys.keys()
    again = StableDiffusion3(str(tiny_sd3), lora=LoRA(2, target_modules=["to_q"]))
    again.load_lora(tmp_path / "best.comfy.safetensors")
    for (_, ours), (_, theirs) in zip(again.trainable_parameters(), model.trainable_parameters(), strict=True):
        ratio = 1.5 if ours.shape[1] == 2 else 1.0
        torch.testing.assert_close(ours, ratio * theirs)


# ComfyUI's published map of Stable Diffusion 3 has `transformer.` and these layers of each block, in `comfy/lora.py`
# and `comfy/utils.py`, and `text_encoder.text_model.` and `text_encoder_2.text_model.` for the layers of both CLIPs.
MMDIT = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
MMDIT |= {f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
MMDIT |= {f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_comfy_file_of_stable_diffusion_3_has_the_names_of_comfyui_and_gives_the_same_images_in_diffusers(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    """The attention of both streams, which is what is adapted by default, and a CLIP's part."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(disable=True)
    model = tuned(tiny_sd3, StableDiffusion3, LoRA(2, alpha=3.0))
    base_file, file = tmp_path / "base.safetensors", tmp_path / "best.comfy.safetensors"
    model.save_lora(base_file)
    clip = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    width = pipeline.text_encoder.config.hidden_size
    extra = {f"{clip}A.weight": torch.ones(1, width), f"{clip}B.weight": torch.full((width, 1), 0.05)}
    save_file({**load_file(base_file), **extra}, base_file)
    loaded = opened(tiny_sd3, StableDiffusion3)
    loaded.load_lora(base_file)
    loaded.save_lora(file, form="comfy")
    keys = {key.rpartition(".")[0].removesuffix(".lora_A").removesuffix(".lora_B") for key in load_file(file)}
    blocks = {key.removeprefix("transformer.transformer_blocks.").partition(".")[2] for key in keys if "blocks" in key}
    assert blocks <= MMDIT
    assert keys - {key for key in keys if "blocks" in key} == {clip.removesuffix(".lora_")}
    start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        chain = SamplingChain(loaded, FlowEuler(2), loaded.encode(PROMPTS[:1]))
        ours = loaded.decode(chain.advance(chain.start(start)).x).clamp(0, 1)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "latents": start, "output_type": "pt"}
    height, width = loaded.image_size
    base = pipeline(PROMPTS[:1], height=height, width=width, **options).images
    content = load_file(file)
    alphas = {key: content.pop(key) for key in list(content) if key.endswith(".alpha")}
    assert all(float(alpha) == len(content[key.replace(".alpha", ".lora_A.weight")]) for key, alpha in alphas.items())
    pipeline.load_lora_weights(content)  # which rejects tensors named alpha; without them, alpha is the rank
    theirs = pipeline(PROMPTS[:1], height=height, width=width, **options).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)
    assert (theirs - base).abs().mean() > 1e-3


def with_text_part(folder: Path, pipeline: Any, target: Path) -> Path:
    """A file of diffusers with adapters in the denoiser and in the first text encoder."""
    source = plain(folder, pipeline)
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    source.unet.add_adapter(LoraConfig(target_modules=["to_q"], **settings))
    source.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "out_proj", "fc1"], **settings))
    layers = {name: get_peft_model_state_dict(getattr(source, name)) for name in ("unet", "text_encoder")}
    alphas = {
        f"{name}_lora_adapter_metadata": getattr(source, name).peft_config["default"].to_dict() for name in layers
    }
    source.save_lora_weights(
        target, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"], **alphas
    )
    return target / "pytorch_lora_weights.safetensors"


def test_text_encoder_part_is_applied_scaled_and_written_again(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder, model_class, pipeline = (tiny_sdxl, *KINDS["tiny_sdxl"])
    file = with_text_part(folder, pipeline, tmp_path)
    theirs = pipeline_images(plain(folder, pipeline, file))
    model = opened(folder, model_class)
    base = images(model)
    model.load_lora(file)
    torch.testing.assert_close(images(model), theirs, rtol=0, atol=2e-4)
    for form in ("diffusers", "comfy"):
        model.save_lora(tmp_path / f"{form}.safetensors", form=form)
        again = pipeline_images(plain(folder, pipeline, tmp_path / f"{form}.safetensors"))
        assert (again - theirs).abs().max() < 2e-4, form
    with model.base():
        torch.testing.assert_close(images(model), base, rtol=0, atol=1e-6)
    with model.adapter_scale(0.5):
        half = images(model)
    assert 3e-4 < (half - base).abs().mean() < (theirs - base).abs().mean()
    torch.testing.assert_close(images(model), theirs, rtol=0, atol=2e-4)


def test_text_encoder_part_alone_changes_the_embeddings_by_its_definition(tiny_sd: Path, tmp_path: Path) -> None:
    """The merged weight is `W + (alpha / rank) B A`, also after other prompts were embedded and after release."""
    file = with_text_part(tiny_sd, StableDiffusionPipeline, tmp_path)
    model = opened(tiny_sd, StableDiffusion)
    before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    plain_text = model.encode(PROMPTS).tensors["text"]
    model.load_lora(file)
    state = load_file(file)
    key = next(name for name in before if name.endswith("layers.0.mlp.fc1.weight"))
    (a,) = (value for name, value in state.items() if "text_encoder" in name and "layers.0.mlp.fc1.lora_A" in name)
    (b,) = (value for name, value in state.items() if "text_encoder" in name and "layers.0.mlp.fc1.lora_B" in name)
    torch.testing.assert_close(model.text_encoder.state_dict()[key], before[key] + 1.5 * b @ a)
    tuned_text = model.encode(PROMPTS).tensors["text"]
    assert not torch.equal(tuned_text, plain_text)
    model.precompute(PROMPTS)
    model.release_text_encoder()
    with model.base():
        assert torch.equal(model.encode(PROMPTS).tensors["text"], plain_text)
    assert torch.equal(model.encode(PROMPTS).tensors["text"], tuned_text)


def old_name(key: str, oldest: bool) -> str:
    """The name of a text encoder's tensor before diffusers used peft, in its first or a later release."""
    for factor, direction in (("lora_A", "down"), ("lora_B", "up")):
        for layer in ("q", "out") if oldest else ():
            key = key.replace(f".{layer}_proj.{factor}.", f".to_{layer}_lora.{direction}.")
        key = key.replace(f".{factor}.", f".lora_linear_layer.{direction}.")
    return key


@pytest.mark.parametrize("denoiser_is_old", [True, False])
@pytest.mark.parametrize("oldest", [True, False])
def test_old_names_of_text_encoder_layers_give_the_images_of_diffusers(
    tiny_sd: Path, tmp_path: Path, oldest: bool, denoiser_is_old: bool
) -> None:
    state = load_file(with_text_part(tiny_sd, StableDiffusionPipeline, tmp_path))
    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    text = {key.partition(".")[2].removeprefix("text_model."): value for key, value in state.items() if key not in unet}
    if denoiser_is_old:
        unet = convert_state_dict_to_diffusers(unet)
    if oldest:
        text = {key: value for key, value in text.items() if ".self_attn." in key}
    named = {f"text_encoder.text_model.{old_name(key, oldest)}": value for key, value in text.items()}
    assert not any("lora_A" in key or "lora_B" in key for key in named)
    file = tmp_path / "old.safetensors"
    save_file({**unet, **named}, file)
    model = opened(tiny_sd, StableDiffusion)
    model.load_lora(file)
    assert len(model.text_updates.updates["text_encoder"]) == len(text) / 2
    theirs = pipeline_images(plain(tiny_sd, StableDiffusionPipeline, file))
    torch.testing.assert_close(images(model), theirs, rtol=0, atol=2e-4)
    with model.text_updates.scaled(0.0):
        assert (images(model) - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    "schedule", [ScaleSchedule(power=2.0, start=0.5), ScaleSchedule(scales=[0.3, 1.0, 2.0]), ScaleSchedule(0.0, 0.5)]
)
def test_code_of_the_card_gives_the_images_of_a_model_with_a_scale_schedule(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: ScaleSchedule
) -> None:
    """Also for a second call, and with a part for the text encoder, which is not scheduled."""
    model = opened(tiny_sd, StableDiffusion)
    model.load_lora(with_text_part(tiny_sd, StableDiffusionPipeline, tmp_path))
    constant = images(model)
    model.set_scale_schedule(schedule)
    model.save_lora(tmp_path / "best.safetensors")
    header = {"base": str(tiny_sd), "scale_schedule": schedule.to_text()}
    card = model_card("x", header, "StableDiffusionPipeline", 2, comfy=False)
    code, call = card.partition("```python\n")[2].partition("\n```")[0].rsplit("\n", 1)
    assert call == 'image = pipe(prompt="a prompt", callback_on_step_end=next_scale).images[0]'
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    pipe = names["pipe"]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = images(model)
    assert (expected - constant).abs().mean() > 1e-4
    for _ in range(2):
        theirs = pipeline_images(partial(pipe, callback_on_step_end=names["next_scale"]), pipe.unet)
        torch.testing.assert_close(expected, theirs, rtol=0, atol=2e-4)


def test_merged_pipeline_includes_the_text_encoder_part(tiny_sd: Path, tmp_path: Path) -> None:
    file = with_text_part(tiny_sd, StableDiffusionPipeline, tmp_path)
    expected = pipeline_images(plain(tiny_sd, StableDiffusionPipeline, file))
    merge_lora(read_lora(file, str(tiny_sd)), tmp_path / "merged")
    merged = plain(tmp_path / "merged", StableDiffusionPipeline)
    torch.testing.assert_close(pipeline_images(merged), expected, rtol=0, atol=2e-4)
    denoiser_only = read_lora(file, str(tiny_sd)).denoiser
    assert {name.rpartition(".")[2] for name in denoiser_only} == {"to_q"}


def test_a_second_file_replaces_the_text_encoder_part_of_the_first(tiny_sd: Path, tmp_path: Path) -> None:
    model = opened(tiny_sd, StableDiffusion)
    before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    model.load_lora(with_text_part(tiny_sd, StableDiffusionPipeline, tmp_path))
    assert any(not torch.equal(value, before[name]) for name, value in model.text_encoder.state_dict().items())
    second = tmp_path / "second.safetensors"
    tuned(tiny_sd, StableDiffusion, LoRA(2, target_modules=["to_q"])).save_lora(second)
    model.load_lora(second)
    torch.testing.assert_close(model.text_encoder.state_dict(), before, rtol=0, atol=0)


def start(folder: Path, tmp_path: Path, rank: int = 4) -> Path:
    file = tmp_path / "start.safetensors"
    tuned(folder, StableDiffusion, LoRA(rank, alpha=6.0, target_modules=["to_q", "conv1"])).save_lora(file)
    return file


def test_training_starts_from_the_layers_rank_and_update_of_a_file(tiny_sd: Path, tmp_path: Path) -> None:
    file = start(tiny_sd, tmp_path)
    loaded = opened(tiny_sd, StableDiffusion)
    base = images(loaded)
    loaded.load_lora(file)
    for lora in (LoRA(init=str(file)), LoRA(6, init=str(file)), LoRA(alpha=2.0, init=str(file))):
        model = opened(tiny_sd, StableDiffusion, lora)
        assert model.lora.rank == (lora.rank or 4)
        torch.testing.assert_close(images(model), images(loaded), rtol=0, atol=1e-5)
        assert len(model.trainable_parameters()) == len(loaded.trainable_parameters())
        with model.base():
            torch.testing.assert_close(images(model), base, rtol=0, atol=1e-6)


def test_a_lower_rank_keeps_the_closest_update_and_states_the_error(tiny_sd: Path, tmp_path: Path) -> None:
    """The error is that of the dense matrices' singular values, by Eckart and Young."""
    file = start(tiny_sd, tmp_path)
    whole = opened(tiny_sd, StableDiffusion).read_lora(file)
    values = [torch.linalg.svdvals(update.dense().double().flatten(1)) for update in whole.denoiser.values()]
    lost = sum(float(each[2:].square().sum()) for each in values)
    total = sum(float(each.square().sum()) for each in values)
    with pytest.warns(UserWarning, match=rf"at rank 2 the update .* relative error of {(lost / total) ** 0.5:.2%}"):
        model = opened(tiny_sd, StableDiffusion, LoRA(2, init=str(file)))
    model.save_lora(tmp_path / "small.safetensors")
    small = model.read_lora(tmp_path / "small.safetensors")
    distance = sum(
        float((small.denoiser[layer].dense() - update.dense()).square().sum())
        for layer, update in whole.denoiser.items()
    )
    assert distance == pytest.approx(lost, rel=1e-4)


def test_reference_can_be_the_initial_model(tiny_sd: Path, tmp_path: Path) -> None:
    file = start(tiny_sd, tmp_path)
    base = images(opened(tiny_sd, StableDiffusion))
    model = opened(tiny_sd, StableDiffusion, LoRA(init=str(file), reference="init"))
    first = images(model)
    for _, value in model.trainable_parameters():
        value.data += 0.1
    assert not torch.allclose(images(model), first, atol=1e-3)
    with model.base():
        assert torch.equal(images(model), first)
    with model.adapter_scale(0.0):
        torch.testing.assert_close(images(model), base, rtol=0, atol=1e-6)


def test_invalid_initial_lora_is_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    file = start(tiny_sd, tmp_path)
    with pytest.raises(ConfigurationError, match="lora.init adapts the layers of its file; leave lora.target_modules"):
        LoRA(init=str(file), target_modules=["to_q"])
    with pytest.raises(ConfigurationError, match="lora.reference=init needs lora.init"):
        LoRA(reference="init")
    with pytest.raises(ConfigurationError, match="lora.init=.* has no effect with trainable: full"):
        StableDiffusion(str(tiny_sd), lora=LoRA(init=str(file)), trainable="full")
    save_file({"lora_unet_x.dora_scale": torch.ones(1)}, file)
    with pytest.raises(ConfigurationError, match="is DoRA, which is not supported"):
        opened(tiny_sd, StableDiffusion, LoRA(init=str(file)))
