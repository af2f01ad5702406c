"""What single model families do differently."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Conditioning, Guidance, LoRA, QwenImage, TextEncoding
from lightning_draft.models.latents import pack, unpack
from lightning_draft.samplers import FlowEuler, Sampler
from lightning_draft.stochastic_flow import FlowCPS
from lightning_draft.weightless import without_weights
from tests.family_cases import CASES, diffusers_images, images, opened, plain, starting_noise
from tests.tiny_flux_2 import flux_2_klein


def test_unpack_inverts_pack() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[0, 1], x[0, :, :2, 2:4].flatten())
    assert torch.equal(unpack(tokens, 4, 6), x)


@pytest.mark.parametrize("prompt", ["10", "a cat", "-1"])
def test_a_prompt_that_is_no_class_is_rejected(folders: Callable, prompt: str) -> None:
    model = opened(folders("pixels_of_classes"), CASES["pixels_of_classes"])
    with pytest.raises(ConfigurationError, match="must be the number of a class of this model, 0 to 9"):
        model.encode([prompt])


def test_an_embedded_guidance_that_has_no_effect_is_rejected(folders: Callable) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance.embedded=3.5 has no effect on this model family"):
        opened(folders("chroma"), CASES["chroma"], guidance=Guidance(embedded=3.5))


@torch.no_grad()
def test_a_distilled_flux_2_klein_has_no_guidance_by_default(folders: Callable, tmp_path: Path) -> None:
    """Like diffusers, whose pipeline ignores its guidance scale for such models."""
    case = CASES["flux_2_klein"]
    flux_2_klein(tmp_path / "distilled", distilled=True)
    model = opened(tmp_path / "distilled", case, lora=None)
    assert (model.guidance.scale, opened(folders("flux_2_klein"), case).guidance.scale) == (1.0, 4.0)
    theirs = diffusers_images(plain(tmp_path / "distilled", case), model, case, 4.0)
    torch.testing.assert_close(images(model, case).clamp(0, 1), theirs, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("sampler", [FlowEuler(1), FlowCPS(1, 1.0), FlowCPS(2, 1.0), FlowCPS(4, 1.0)])
def test_each_number_of_steps_of_sana_sprint_gives_the_images_of_diffusers(folders: Callable, sampler: Sampler) -> None:
    """With the same noise after each step; one step is deterministic."""
    case, steps = CASES["sana_sprint"], sampler.num_steps
    model = opened(folders("sana_sprint"), case, lora=None, guidance=Guidance(embedded=7.0))
    call = {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None}
    theirs = diffusers_images(plain(folders("sana_sprint"), case), model, case, guidance_scale=7.0, **call)
    torch.testing.assert_close(images(model, case, sampler).clamp(0, 1), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["flux_2_klein", "z_image"])
def test_a_prompt_that_is_truncated_with_its_chat_template_gives_a_warning(folders: Callable, name: str) -> None:
    model = opened(folders(name), CASES[name], text=TextEncoding(26), guidance=Guidance(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["a red cat"])  # 26 tokens with the template
    with pytest.warns(UserWarning, match="the model reads 26 tokens and truncates the prompt: a red cats"):
        model.encode(["a red cats"])


def test_the_embedded_guidance_reaches_the_network(folders: Callable) -> None:
    case, folder = CASES["flux"], folders("flux")
    default, given, stronger = (
        images(opened(folder, case, lora=None, guidance=Guidance(embedded=value)), case) for value in (None, 3.5, 8.0)
    )
    assert torch.equal(default, given)
    assert (stronger - given).abs().max() > 1e-3


def test_the_largest_norm_of_guided_predictions_is_that_of_the_z_image_pipeline(folders: Callable) -> None:
    case, folder = CASES["z_image"], folders("z_image")
    model = opened(folder, case, lora=None, guidance=Guidance(6.0, max_norm=0.9))
    ours = images(model, case)
    theirs = diffusers_images(plain(folder, case), model, case, 6.0, cfg_normalization=0.9)
    torch.testing.assert_close(ours.clamp(0, 1), theirs, rtol=0, atol=2e-5)
    assert (images(opened(folder, case, lora=None, guidance=Guidance(6.0)), case) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_a_network_that_was_called_in_inference_mode_is_differentiable(folders: Callable, name: str) -> None:
    """On another device than that of the frequencies of positions, which these networks copy and cache."""
    model = opened(folders(name), CASES[name], guidance=Guidance(1.0), lora=LoRA(2, target_modules=["to_q"]))
    texts = model.encode(CASES[name].prompts).ragged["text"]
    model.to("meta")
    conditioning = Conditioning({}, {"text": tuple(text.to("meta") for text in texts)})
    x = torch.zeros(2, *model.latent_shape, device="meta")
    with torch.inference_mode():
        model(x, 0.5, conditioning)
    model(x, 0.5, conditioning).sum().backward()
    assert all(value.grad is not None for _, value in model.trainable_parameters())


def test_prompts_have_their_lengths_without_weights(folders: Callable) -> None:
    """Which the lengths of embeddings, and with them the memory of a step, depend on."""
    case, folder = CASES["qwen_image"], str(folders("qwen_image"))
    with without_weights():
        texts = QwenImage(folder, lora=None).encode(case.prompts).ragged["text"]
    real = QwenImage(folder, lora=None).encode(case.prompts).ragged["text"]
    assert [text.shape for text in texts] == [text.shape for text in real]
    assert len(real[0]) - len(real[1]) == len("a red ") - len("dog, ")  # "cat" is one token


def test_images_of_qwen_image_are_not_clamped(folders: Callable) -> None:
    """The autoencoder's own method clamps them, and clamped pixels have no gradient."""
    model = opened(folders("qwen_image"), CASES["qwen_image"], lora=None)
    latents = starting_noise(model)
    model.vae.decoder.conv_out.weight.data *= 20
    decoded = model.decode(latents)
    assert ((decoded < 0) | (decoded > 1)).float().mean() > 0.05
    whole = model.vae.decode(model.family.latents.unscale(model.vae, latents).unsqueeze(2)).sample.squeeze(2)
    torch.testing.assert_close(decoded.clamp(0, 1), whole / 2 + 0.5)


# ComfyUI's `comfy/lora.py` maps these names with the prefix `diffusion_model.`: of Z-Image by `z_image_to_diffusers` of
# `comfy/utils.py`, of Qwen-Image because its own network has the names of diffusers.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
COMFY = {
    "z_image": [f"{block}.0.attention" for block in ("layers", "context_refiner", "noise_refiner")],
    "qwen_image": [f"transformer_blocks.{number}.attn" for number in range(2)],
}


@pytest.mark.parametrize("name", COMFY)
def test_comfy_file_has_the_names_of_comfyui_and_is_the_same_lora_in_diffusers(
    folders: Callable, name: str, tmp_path: Path
) -> None:
    model = opened(folders(name), CASES[name], lora=LoRA(2, alpha=3.0))
    plain_file, file = tmp_path / "best.safetensors", tmp_path / "best.comfy.safetensors"
    model.save_lora(plain_file)
    model.save_lora(file, form="comfy")
    kinds = ("lora_A.weight", "lora_B.weight", "alpha")
    layers = [f"{layer}.{projection}" for layer in COMFY[name] for projection in PROJECTIONS]
    assert load_file(file).keys() == {f"diffusion_model.{layer}.{kind}" for layer in layers for kind in kinds}
    read = model.family.pipeline_class.lora_state_dict
    comfy, plain = read(str(file)), read(str(plain_file))
    assert comfy.keys() == plain.keys()
    for layer in layers:
        (a, b), (same_a, same_b) = (
            [state[f"transformer.{layer}.{kind}"] for kind in kinds[:2]] for state in (comfy, plain)
        )
        torch.testing.assert_close(b @ a, 1.5 * (same_b @ same_a))
    again = opened(folders(name), CASES[name], lora=LoRA(2))
    again.load_lora(file)
    torch.testing.assert_close(images(again, CASES[name]), images(model, CASES[name]))
