import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.samplers import DDIM

PROMPTS = ["a red cat", "dog"]


def tuned(folder: Path, lora: LoRA, **arguments: Any) -> StableDiffusion:
    """A model whose adapters are not zero."""
    model = StableDiffusion(str(folder), lora=lora, guidance=Guidance(2.0), **arguments)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return model


def noise() -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def sampled_images(model: StableDiffusion) -> Tensor:
    """Clamped images."""
    chain = SamplingChain(model, DDIM(4), model.encode(PROMPTS))
    return model.decode(chain.advance(chain.start(noise())).x).clamp(0, 1)


def plain(folder: Path) -> StableDiffusionPipeline:
    """The pipeline opened by diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_images(pipeline: StableDiffusionPipeline, **arguments: Any) -> Tensor:
    """The same from diffusers."""
    images: Tensor = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=2.0, latents=noise(), output_type="pt", **arguments
    ).images
    return images


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=4, alpha=6.0, target_modules=["to_q", "conv1"])])
def test_saved_lora_gives_the_same_images_in_diffusers(tiny_sd: Path, tmp_path: Path, lora: LoRA) -> None:
    """Opened by path and by folder, at scale 1 and another scale."""
    model = tuned(tiny_sd, lora)
    file = tmp_path / "deep" / "last.safetensors"
    model.save_lora(file, {"reward": "brightness", "step": "12"})
    pipeline = plain(tiny_sd)
    base = pipeline_images(pipeline)
    pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(pipeline_images(pipeline), sampled_images(model), rtol=0, atol=2e-4)
    assert (sampled_images(model) - base).abs().mean() > 0.01
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    scaled = pipeline_images(pipeline, cross_attention_kwargs={"scale": 0.5})
    with model.adapter_scale(0.5):
        torch.testing.assert_close(scaled, sampled_images(model), rtol=0, atol=2e-4)
    with safe_open(file, "pt") as header:
        assert header.metadata()["step"] == "12"
        assert json.loads(header.metadata()["lora_adapter_metadata"])["unet.r"] == 4
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_load_lora_restores_values_bitwise_and_in_place(tiny_sd: Path, tmp_path: Path) -> None:
    model = tuned(tiny_sd, LoRA(rank=4, alpha=3.0))
    model.save_lora(tmp_path / "lora.safetensors")
    other = StableDiffusion(str(tiny_sd), lora=LoRA(rank=4, alpha=3.0), guidance=Guidance(2.0), dtype="bfloat16")
    before = dict(other.trainable_parameters())
    other.load_lora(tmp_path / "lora.safetensors")
    for name, value in model.trainable_parameters():
        assert torch.equal(before[name], value)
        assert before[name].requires_grad


def test_load_lora_keeps_the_update_if_alpha_differs(tiny_sd: Path, tmp_path: Path) -> None:
    model = tuned(tiny_sd, LoRA(rank=4, alpha=6.0))
    model.save_lora(tmp_path / "lora.safetensors")
    other = StableDiffusion(str(tiny_sd), lora=LoRA(rank=4), guidance=Guidance(2.0))
    other.load_lora(tmp_path / "lora.safetensors")
    torch.testing.assert_close(sampled_images(other), sampled_images(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("old", [False, True])
def test_load_lora_reads_files_written_by_diffusers(tiny_sd: Path, tmp_path: Path, old: bool) -> None:
    """Written by `save_lora_weights`, with the names of peft and of diffusers' training scripts."""
    pipeline = plain(tiny_sd)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    state = get_peft_model_state_dict(pipeline.unet)
    state = convert_state_dict_to_diffusers(state) if old else state
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    model = StableDiffusion(str(tiny_sd), lora=LoRA(2, target_modules=["to_q", "to_out.0"]), guidance=Guidance(2.0))
    model.load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sampled_images(model), pipeline_images(pipeline), rtol=0, atol=2e-4)


def test_seed_determines_the_initial_adapters(tiny_sd: Path) -> None:
    """For any precision of the base, and without using the global generator."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [
        StableDiffusion(str(tiny_sd), lora=LoRA(seed=seed), dtype=dtype)
        for seed, dtype in ((0, "float32"), (0, "bfloat16"), (1, "float32"))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, half, other = (dict(model.trainable_parameters()) for model in models)
    for name, value in first.items():
        assert torch.equal(value, half[name])
        assert half[name].dtype == torch.float32
        assert ("lora_B" in name) == (not value.any())
        assert "lora_B" in name or not torch.equal(value, other[name])


def test_without_a_seed_the_global_generator_is_used(tiny_sd: Path) -> None:
    initial = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        initial.append(StableDiffusion(str(tiny_sd)).trainable_parameters()[0][1])
    assert torch.equal(initial[0], initial[1])
    assert not torch.equal(initial[0], initial[2])


def test_attention_adapters_of_stable_diffusion_15_have_the_known_size() -> None:
    """797,184 parameters at rank 4; counted on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        network.requires_grad_(False)
        network.add_adapter(LoRA(rank=4).config())
    assert sum(value.numel() for value in network.parameters() if value.requires_grad) == 797_184


def test_model_without_adapters_has_no_trainable_parameters(tiny_sd: Path, tmp_path: Path) -> None:
    model = StableDiffusion(str(tiny_sd), lora=None)
    assert model.trainable_parameters() == []
    with pytest.raises(ValueError, match="save_lora needs adapters.*lora=LoRA"):
        model.save_lora(tmp_path / "lora.safetensors")


def test_lora_files_of_another_shape_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    model = StableDiffusion(str(tiny_sd), lora=LoRA(rank=4))
    with pytest.raises(ValueError, match="there is no LoRA file .*none.safetensors"):
        model.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        model.save_lora(tmp_path / "lora.bin")
    file = tmp_path / "lora.safetensors"
    StableDiffusion(str(tiny_sd), lora=LoRA(rank=2, target_modules=["to_q", "to_out.0"])).save_lora(file)
    message = (
        r"rank 2 on to_out.0, to_q \(.* layers\); build .* lora=LoRA\(rank=2, target_modules=\['to_out.0', 'to_q'\]\)"
    )
    with pytest.raises(ValueError, match=message):
        model.load_lora(file)
    save_file({**load_file(file), "text_encoder_9.q.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="adapts something other than unet, text_encoder .text_encoder_9.q"):
        model.load_lora(file)


def test_invalid_arguments_are_rejected(tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match="lora.rank=0 must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="lora.alpha=-1 must be positive"):
        LoRA(alpha=-1)
    with pytest.raises(ValueError, match="lora.target_modules='to_q' must be a list"):
        LoRA(target_modules="to_q")
    with pytest.raises(ValueError, match=r"target_modules=to_x cannot be adapted .* linear layers are .*to_k"):
        StableDiffusion(str(tiny_sd), lora=LoRA(target_modules=["to_x"]))


def test_adapters_stay_disabled_after_an_inner_context(tiny_sd: Path) -> None:
    model = tuned(tiny_sd, LoRA(rank=2))
    with torch.no_grad(), model.base():
        expected = sampled_images(model)
        with model.base():
            pass
        assert torch.equal(sampled_images(model), expected)
    assert not torch.equal(sampled_images(model), expected)
