"""Stable Diffusion 3 against diffusers' pipeline, with a small random pipeline and all three text encoders."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import (
    Guidance,
    Memory,
    StableDiffusion,
    StableDiffusion3,
    TextEncoding,
)
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM, FlowEuler, FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.truncation import LowVariance
from tests.tiny_stable_diffusion_3 import (
    LENGTH,
    OMIT_T5,
    PROMPTS,
    WITHOUT_T5,
    edited,
    noise,
    opened,
    pipeline_images,
    plain,
    sample,
    sampled_images,
)


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_equal_those_of_the_diffusers_pipeline(tiny_sd3: Path, guidance_scale: float, t5: bool) -> None:
    pipeline = plain(tiny_sd3, **({} if t5 else WITHOUT_T5))
    arguments = {"negative_prompt": ["tree"] * 2, "num_inference_steps": 6, "guidance_scale": guidance_scale}
    model = opened(tiny_sd3, guidance=Guidance(guidance_scale, "tree"), omit=() if t5 else OMIT_T5)
    with torch.no_grad():
        ours = sample(model, noise(), FlowEuler(6))
        decoded = model.decode(ours)
    theirs = pipeline_images(pipeline, output_type="latent", **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded.clamp(0, 1), pipeline_images(pipeline, **arguments), rtol=0, atol=1e-5)
    assert ((decoded > 0) & (decoded < 1)).float().mean() > 0.1


def test_images_of_another_resolution(tiny_sd3: Path) -> None:
    model = opened(tiny_sd3, height=24, width=32)
    assert model.image_size == (24, 32)
    start = model.noise(2, torch.Generator().manual_seed(5))
    assert torch.equal(start, torch.randn(2, 16, 12, 16, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        ours = model.decode(sample(model, start)).clamp(0, 1)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": LENGTH, "output_type": "pt"}
    theirs = plain(tiny_sd3)(PROMPTS, height=24, width=32, latents=start, **settings).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_times_equal_those_of_the_pipelines_scheduler(tiny_sd3: Path, tmp_path: Path) -> None:
    """For any shift; the input of the network is the flow's time in units of training timesteps."""
    folder = edited(tiny_sd3, tmp_path / "shifted", "scheduler/scheduler_config.json", shift=5.0)
    model = opened(folder, guidance=Guidance(1.0))
    assert model.schedule == RectifiedFlow(5.0, 1000)
    assert model.prediction == "flow"
    given: list[Tensor] = []
    model.transformer.register_forward_pre_hook(
        lambda _, __, arguments: given.append(arguments["timestep"]), with_kwargs=True
    )
    with torch.no_grad():
        sample(model, noise(), FlowEuler(7))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(torch.stack(given), scheduler.timesteps[:, None].expand(7, 2))


def test_decoding_uses_the_scaling_and_shift_of_the_autoencoder(tiny_sd3: Path) -> None:
    """At once, in chunks, and recomputed in the backward pass."""
    model = opened(tiny_sd3).double()
    latents = noise(3, torch.float64).requires_grad_()
    expected = model.vae.decode(latents / 1.5305 + 0.0609, return_dict=False)[0] / 2 + 0.5
    (slope,) = torch.autograd.grad(expected.square().sum(), latents)
    for chunk, recompute in ((None, False), (2, False), (2, True)):
        model.memory = Memory(chunk, recompute)
        images = model.decode(latents)
        torch.testing.assert_close(images, expected)
        torch.testing.assert_close(torch.autograd.grad(images.square().sum(), latents)[0], slope)


def test_stochastic_sampling_without_noise_equals_the_flow(tiny_sd3: Path) -> None:
    model = opened(tiny_sd3)
    with torch.no_grad():
        expected = sample(model, noise())
        torch.testing.assert_close(sample(model, noise(), FlowSDE(4, noise_level=0.0)), expected)
        assert not torch.allclose(sample(model, noise(), FlowSDE(4)), expected, atol=0.1)


def test_a_pipeline_saved_without_the_t5_opens_without_an_option(tiny_sd3: Path, tmp_path: Path) -> None:
    plain(tiny_sd3, **WITHOUT_T5).save_pretrained(tmp_path / "light")
    model = opened(tmp_path / "light")
    assert model.text_encoder_3 is None
    assert torch.equal(sampled_images(model), sampled_images(opened(tiny_sd3, omit=OMIT_T5)))


def test_half_precision_is_close_to_float32(tiny_sd3: Path) -> None:
    whole, half = (sampled_images(opened(tiny_sd3, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.02


# Text.


NAMES = ("text", "pooled")


@pytest.mark.parametrize("t5", [True, False])
def test_embeddings_equal_those_of_the_pipeline_and_are_cached(tiny_sd3: Path, t5: bool) -> None:
    model = opened(tiny_sd3, guidance=Guidance(negative_prompt="tree"), omit=() if t5 else OMIT_T5)
    calls: list[int] = []
    assert model.text_encoder_2 is not None
    model.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    first = model.encode([*PROMPTS, PROMPTS[0]])
    second = model.encode(PROMPTS[::-1])
    assert len(calls) == 3
    pipeline = plain(tiny_sd3, **({} if t5 else WITHOUT_T5))
    expected = pipeline.encode_prompt(
        PROMPTS, None, None, negative_prompt=["tree"] * 2, max_sequence_length=LENGTH, device=torch.device("cpu")
    )
    text, negative, pooled, negative_pooled = expected
    assert first.negative is not None
    for name, given, other in (("text", text, negative), ("pooled", pooled, negative_pooled)):
        torch.testing.assert_close(first.tensors[name][:2], given)
        torch.testing.assert_close(second.tensors[name], given.flip(0))
        torch.testing.assert_close(first.negative.tensors[name][:2], other)
    assert first.tensors["text"].shape == (3, 12 + LENGTH, 40)
    assert first.tensors["text"][:, 12:].any() == t5


def test_every_embedding_reaches_the_network(tiny_sd3: Path) -> None:
    """Without guidance, each text embedding and the pooled one have an effect, and the negative prompt has none."""
    model = opened(tiny_sd3, guidance=Guidance(1.0))
    conditioning = model.encode(PROMPTS)
    assert conditioning.negative is None
    given = [conditioning.tensors[name].requires_grad_() for name in NAMES]
    output = model(noise(), 0.5, conditioning)
    text, pooled = torch.autograd.grad(output.square().sum(), given)
    assert all(part.any() for part in (text[:, :12, :16], text[:, :12, 16:32], text[:, 12:], pooled))


def test_text_encoders_can_be_released(tiny_sd3: Path) -> None:
    model = opened(tiny_sd3)
    model.precompute(PROMPTS)
    before = sampled_images(model)
    model.release_text_encoder()
    assert not any(name.startswith("text_encoder") for name in model.state_dict())
    assert torch.equal(sampled_images(model), before)
    with pytest.raises(RuntimeError, match="'a new one' has no embedding; pass all prompts.* to precompute"):
        model.encode(["a new one"])


def test_truncated_prompts_are_named_in_a_warning(tiny_sd3: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The limit is that of the T5, or of the CLIPs without a T5."""
    opened(tiny_sd3).encode(["a prompt for it"])
    assert not [warning for warning in recwarn if "cuts" in str(warning.message)]
    with pytest.warns(UserWarning, match="reads 20 tokens and truncates the prompt: a very long prompt"):
        opened(tiny_sd3).encode(["a very long prompt for it"])
    with pytest.warns(UserWarning, match="reads 12 tokens and truncates the prompt: a prompt"):
        opened(tiny_sd3, omit=OMIT_T5).encode(["a prompt for it"])


# Invalid input.


def test_error_names_the_model_class_of_the_pipeline(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a StableDiffusion3Pipeline .*; open it with StableDiffusion3$"):
        StableDiffusion(str(tiny_sd3))
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline .*; open it with StableDiffusion$"):
        StableDiffusion3(str(tiny_sd))
    other = edited(tiny_sd3, tmp_path / "other", "model_index.json", _class_name="AuraFlowPipeline")
    with pytest.raises(ValueError, match="is a AuraFlowPipeline and not .* for example stabilityai/stable-diffusion-3"):
        StableDiffusion3(str(other))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of a known model; give one of .* or a pipeline folder"):
        StableDiffusion3(str(tmp_path / "model.safetensors"))


def test_one_name_is_no_list_of_omitted_components(tiny_sd3: Path) -> None:
    with pytest.raises(ValueError, match=r"omit='text_encoder_3' must be a list .*; write \[text_encoder_3\]"):
        opened(tiny_sd3, omit="text_encoder_3")


def test_samplers_for_other_schedules_are_rejected(tiny_sd3: Path) -> None:
    draft = DraftModule(opened(tiny_sd3), ColorBalance(), DDIM(4), LowVariance())
    draft.trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="DDIM needs a variance-preserving model; use FlowEuler"):
        draft.setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dynamic_shifting": True}, "has use_dynamic_shifting=True, .* set shift, which is 3.0"),
        ({"use_karras_sigmas": True}, "remove use_karras_sigmas from"),
    ],
)
def test_invalid_grids_are_rejected(tiny_sd3: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = edited(tiny_sd3, tmp_path / "pipeline", "scheduler/scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        StableDiffusion3(str(folder))


def test_invalid_components_are_rejected(tiny_sd3: Path, tmp_path: Path) -> None:
    pipeline = plain(tiny_sd3)
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler()
    pipeline.save_pretrained(tmp_path / "ddim")
    with pytest.raises(
        ValueError,
        match="DDIMScheduler is not made for rectified flows; replace its config by that of a FlowMatchEuler",
    ):
        StableDiffusion3(str(tmp_path / "ddim"))
    pipeline.scheduler = scheduler
    pipeline.transformer = SD3Transformer2DModel.from_config({**pipeline.transformer.config, "in_channels": 32})
    pipeline.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="its network needs 32 channels and the autoencoder has 16"):
        StableDiffusion3(str(tmp_path / "wide"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8' is not a valid choice; write one of float32"),
        ({"text": TextEncoding(600)}, r"text.max_length=600 must be between 1 and 512; write 256"),
        ({"height": 18, "width": 16}, "height=18 must be a positive multiple of 4 up to 48 for this model; write 16"),
        ({"height": 16, "width": 52}, "width=52 must be a positive multiple of 4 up to 48"),
    ],
)
def test_invalid_arguments_are_rejected(tiny_sd3: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableDiffusion3(str(tiny_sd3), **arguments)
