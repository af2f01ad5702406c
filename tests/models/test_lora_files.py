"""LoRA files of kohya's scripts and old diffusers versions, of other kinds and models, and damaged files."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Guidance, LoRA, StableDiffusion, StableDiffusion3, TextEncoding
from lightning_draft.samplers import DDIM
from lightning_draft.weightless import without_weights

PROMPTS = ["a red cat", "dog"]
RANKS = {"to_q": 4, "to_out.0": 2, "conv1": 4}
ALPHAS = {"to_q": 2.0, "to_out.0": 8.0, "conv1": 1.0}


def noise() -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def sampled_images(model: StableDiffusion) -> Tensor:
    """Clamped images."""
    chain = SamplingChain(model, DDIM(4), model.encode(PROMPTS))
    return model.decode(chain.advance(chain.start(noise())).x).clamp(0, 1)


def theirs(folder: Path, file: Path) -> Tensor:
    """Generate images with diffusers and a LoRA file, read by diffusers' converter."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file))
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": noise(), "output_type": "pt"}
    images: Tensor = pipeline(PROMPTS, **options).images
    return images


def opened(folder: Path, lora: LoRA | None = None) -> StableDiffusion:
    """A model, by default without adapters."""
    return StableDiffusion(str(folder), lora=lora, guidance=Guidance(2.0))


def kohya(folder: Path, alpha: float | None = None, **changes: Tensor) -> dict[str, Tensor]:
    """Random factors of several ranks with the names of kohya's scripts, and one or several alphas."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, layer in opened(folder).unet.named_modules():
        end = next((end for end in RANKS if name.endswith(f".{end}")), None)
        if end is None:
            continue
        out, *into = layer.weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = 0.3 * torch.randn(RANKS[end], *into, generator=generator)
        up = (out, RANKS[end], *[1] * (len(into) - 1))
        state[f"{key}.lora_up.weight"] = 0.3 * torch.randn(up, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(ALPHAS[end] if alpha is None else alpha)
    return {**state, **changes}


def merged(folder: Path, state: dict[str, Tensor]) -> StableDiffusion:
    """A model with the weights `W + (alpha / rank) B A`."""
    model = opened(folder)
    for name, layer in model.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in state:
            down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
            update = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
            layer.weight.data += float(state[f"{key}.alpha"]) / len(down) * update
    return model


def test_kohya_file_with_several_ranks_and_alphas_gives_the_defined_update(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers 0.42 cannot be the reference: it ignores alphas of attention layers that differ from the others."""
    file, state = tmp_path / "kohya.safetensors", kohya(tiny_sd)
    save_file(state, file)
    model = opened(tiny_sd)
    base = sampled_images(model)
    model.load_lora(file)
    torch.testing.assert_close(sampled_images(model), sampled_images(merged(tiny_sd, state)), rtol=0, atol=2e-4)
    assert (sampled_images(model) - base).abs().mean() > 0.01
    model.save_lora(tmp_path / "again.safetensors")
    torch.testing.assert_close(
        theirs(tiny_sd, tmp_path / "again.safetensors"), sampled_images(model), rtol=0, atol=2e-4
    )


def test_kohya_file_with_one_alpha_is_read_as_diffusers_reads_it(tiny_sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    save_file(kohya(tiny_sd, alpha=3.0), file)
    model = opened(tiny_sd)
    model.load_lora(file)
    torch.testing.assert_close(sampled_images(model), theirs(tiny_sd, file), rtol=0, atol=2e-4)


@pytest.mark.parametrize("old", [False, True])
def test_model_without_adapters_gets_those_of_the_file(tiny_sd: Path, tmp_path: Path, old: bool) -> None:
    """With the current and old names of diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    state = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(state) if old else state)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    model = opened(tiny_sd)
    model.load_lora(file)
    assert model.lora is not None
    assert model.lora.rank == 2
    torch.testing.assert_close(sampled_images(model), theirs(tiny_sd, file), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.oft_diag", "OFT"),
        ("base_model.model.to_q.oft_R.weight", "OFT"),
        ("lora_unet_x.diff", "full weight differences"),
        ("diffusion_model.x.diff_b", "full weight differences"),
    ],
)
def test_unsupported_kinds_of_lora_are_named_in_the_error(tiny_sd: Path, tmp_path: Path, key: str, kind: str) -> None:
    save_file(kohya(tiny_sd, **{key: torch.ones(1)}), tmp_path / "other.safetensors")
    with pytest.raises(ConfigurationError, match=f"is {kind}, which is not supported; give a plain LoRA file"):
        opened(tiny_sd).load_lora(tmp_path / "other.safetensors")


def test_text_encoder_layers_of_another_model_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    extra = {f"{key}.lora_down.weight": torch.ones(1, 99), f"{key}.lora_up.weight": torch.ones(99, 1)}
    save_file(kohya(tiny_sd, **extra), tmp_path / "other.safetensors")
    message = "1 of its 1 layers of text_encoder have other shapes in this model, such as encoder.*q_proj"
    with pytest.raises(ConfigurationError, match=message):
        opened(tiny_sd).load_lora(tmp_path / "other.safetensors")


@pytest.mark.parametrize("options", [{"text": TextEncoding(cache="embeddings")}, {"quantization": "torchao-int8"}])
def test_a_text_encoder_part_is_rejected_with_frozen_embeddings(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """In the formats of kohya's scripts and of peft."""
    monkeypatch.chdir(tmp_path)
    key, layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "encoder.layers.0.self_attn.q_proj"
    width = opened(tiny_sd).text_encoder.config.hidden_size
    factors = {"lora_down.weight": torch.ones(1, width), "lora_up.weight": torch.ones(width, 1)}
    save_file(kohya(tiny_sd, **{f"{key}.{name}": value for name, value in factors.items()}), "kohya.safetensors")
    opened(tiny_sd, LoRA(2)).save_lora(tmp_path / "lora.safetensors")
    factors = {"lora_A.weight": torch.ones(1, width), "lora_B.weight": torch.ones(width, 1)}
    part = {f"text_encoder.{layer}.{name}": value for name, value in factors.items()}
    save_file({**load_file("lora.safetensors"), **part}, "peft.safetensors")
    with without_weights():
        model = StableDiffusion(str(tiny_sd), **options)
    for name in ("kohya", "peft"):
        opened(tiny_sd).load_lora(f"{name}.safetensors")
        with pytest.raises(ConfigurationError, match=r"set text.cache to null|leave quantization out"):
            model.read_lora(f"{name}.safetensors")


def test_damaged_files_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    opened(tiny_sd, LoRA(2)).save_lora(file)
    whole = load_file(file)
    first = next(name for name in sorted(whole) if "lora_B" in name)
    model = opened(tiny_sd, LoRA(2))
    save_file({**whole, first: whole[first].fill_(float("nan"))}, file)
    with pytest.raises(ConfigurationError, match="first in .*; training has probably diverged: use an earlier"):
        model.load_lora(file)
    save_file({name: value for name, value in whole.items() if name != first}, file)
    with pytest.raises(ConfigurationError, match="is incomplete: .* has no lora_B"):
        model.load_lora(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match="is damaged or not a safetensors file"):
        model.load_lora(file)
    save_file({"weight": torch.ones(1)}, file)
    with pytest.raises(ConfigurationError, match="contains no LoRA"):
        model.load_lora(file)


def test_lora_of_another_model_is_rejected(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    StableDiffusion3(str(tiny_sd3)).save_lora(file)
    state = load_file(file)
    save_file({name.replace("transformer.", "unet."): value for name, value in state.items()}, file)
    for model in (opened(tiny_sd, LoRA(8)), opened(tiny_sd)):
        with pytest.raises(ConfigurationError, match="for another model: .* such as .* more; give a file") as error:
            model.load_lora(file)
        assert len(str(error.value)) < 500


def test_files_are_readable_by_others(tiny_sd: Path, tmp_path: Path) -> None:
    opened(tiny_sd, LoRA(2)).save_lora(tmp_path / "lora.safetensors")
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "lora.safetensors").stat().st_mode & 0o777 == 0o666 & ~before
