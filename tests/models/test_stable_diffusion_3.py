"""Stable Diffusion 3 against diffusers' pipeline, with a small random pipeline and all three text encoders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.callbacks import GradientNormMonitor, LoRAExport, SampleLogger
from lightning_draft.chain import Recompute, SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import (
    DiffusionModel,
    Guidance,
    LoRA,
    Memory,
    StableDiffusion,
    StableDiffusion3,
    TextEncoding,
)
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM, FlowEuler, FlowSDE, Sampler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, Truncation

PROMPTS = ["a red cat", "dog, cat"]
LENGTH = 20
NAMES = ("text", "pooled")
OMIT_T5 = ("text_encoder_3",)
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def plain(folder: Path, dtype: torch.dtype = torch.float32, **parts: None) -> StableDiffusion3Pipeline:
    """The same pipeline as diffusers opens it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(batch: int = 2, dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    """Fixed starting latents."""
    return torch.randn(batch, 16, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


def opened(folder: Path, **arguments: Any) -> StableDiffusion3:
    """A model whose T5 reads only a few tokens."""
    return StableDiffusion3(str(folder), **{"text": TextEncoding(LENGTH), "guidance": Guidance(2.0), **arguments})


def stirred(folder: Path, **arguments: Any) -> StableDiffusion3:
    """A model whose adapters are not zero."""
    model = opened(folder, **arguments)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


def sample(model: DiffusionModel, start: Tensor, sampler: Sampler | None = None) -> Tensor:
    """Latents at the end of the chain."""
    chain = SamplingChain(model, FlowEuler(4) if sampler is None else sampler, model.encode(PROMPTS))
    return chain.advance(chain.start(start)).x


@torch.no_grad()
def sampled_images(model: DiffusionModel) -> Tensor:
    """Clamped images."""
    return model.decode(sample(model, noise())).clamp(0, 1)


def pipeline_images(pipeline: StableDiffusion3Pipeline, **arguments: Any) -> Tensor:
    """The same from diffusers."""
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": LENGTH, "output_type": "pt"}
    images: Tensor = pipeline(PROMPTS, latents=noise(), **{**settings, **arguments}).images
    return images


def gradients(model: StableDiffusion3, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient in every trainable parameter."""
    names, values = zip(*model.trainable_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    """Assert equal names, and values that are equal relative to the norm of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


def edited(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline with changes to one of its JSON files."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


@pytest.fixture(scope="module")
def exact(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Remove the norms of queries and keys, which diffusers computes in float32 for any dtype."""
    return edited(tiny_sd3, tmp_path_factory.mktemp("sd3") / "exact", "transformer/config.json", qk_norm=None)


# Sampling.


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


# Text.


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


# Gradients.


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_gradients_equal_finite_differences(exact: Path, guidance_scale: float) -> None:
    """Through all steps and the decoder, for both attentions of the image and that of the text."""
    model = stirred(exact, guidance=Guidance(guidance_scale)).double()
    conditioning, start = model.encode(PROMPTS), noise(dtype=torch.float64)

    def loss() -> Tensor:
        return model.decode(Full()(SamplingChain(model, FlowEuler(3), conditioning), start)).square().sum()

    found = gradients(model, loss())
    parameters = dict(model.trainable_parameters())
    for layer in ("0.attn.to_q", "0.attn2.to_v", "0.attn.add_k_proj", "0.attn.to_add_out", "1.attn.to_out.0"):
        for factor in ("lora_A", "lora_B"):
            name = f"transformer.transformer_blocks.{layer}.{factor}.default.weight"
            value = parameters[name]
            direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            values = []
            with torch.no_grad():
                for step in (1e-4, -1e-4):
                    value += step * direction
                    values.append(loss())
                    value -= step * direction
            slope = (found[name] * direction).sum()
            torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-8)
            assert slope.abs() > 1e-6, name


def test_guidance_gradients_equal_hand_computation(exact: Path) -> None:
    """`v_u + w (v_c - v_u)`: weights `w` and `1 - w` in full, `w` and 0 in conditional."""
    w, x = 3.0, noise(dtype=torch.float64)
    model = stirred(exact, guidance=Guidance(w, "tree")).double()
    both = model.encode(PROMPTS)
    assert both.negative is not None
    time = torch.full((2,), 500.0)

    def slope(text: Tensor, pooled: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        output = model.transformer(x, text.double(), pooled.double(), time, return_dict=False)[0]
        return gradients(model, (output * cotangent).sum())

    output = model(x, 0.5, model.encode(PROMPTS))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = slope(*both.tensors.values(), cotangent)
    negative = slope(*both.negative.tensors.values(), cotangent)
    full = {name: w * given[name] + (1 - w) * negative[name] for name in given}
    assert_close(gradients(model, (output * cotangent).sum()), full, 1e-9)
    model.guidance = replace(model.guidance, gradient="conditional")
    again = model(x, 0.5, model.encode(PROMPTS))
    torch.testing.assert_close(again, output)
    half = {name: w * value for name, value in given.items()}
    assert_close(gradients(model, (again * cotangent).sum()), half, 1e-9)


def test_checkpointing_gives_equal_gradients(tiny_sd3: Path) -> None:
    model = stirred(tiny_sd3).double()

    def found(**options: bool) -> dict[str, Tensor]:
        chain = SamplingChain(model, FlowEuler(3), model.encode(PROMPTS), recompute=Recompute(**options))
        return gradients(model, model.decode(LastK(2)(chain, noise(dtype=torch.float64))).square().mean())

    expected = found()
    assert_close(found(steps=True), expected, 1e-12)
    assert_close(found(blocks=True), expected, 1e-12)
    assert model.block_checkpointing
    assert_close(found(steps=True, blocks=True), expected, 1e-12)


def test_block_checkpointing_stores_fewer_activations(tiny_sd3: Path) -> None:
    model = opened(tiny_sd3)
    conditioning = model.encode(PROMPTS)

    def kept() -> int:
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(noise(), 0.5, conditioning)
        return elements

    whole = kept()
    model.checkpoint_blocks(True)
    assert kept() < 0.5 * whole


# Adapters.


def test_base_equals_the_pipeline_without_adapters_bitwise(tiny_sd3: Path) -> None:
    expected = sampled_images(opened(tiny_sd3, lora=None))
    assert torch.equal(sampled_images(opened(tiny_sd3)), expected)
    model = stirred(tiny_sd3)
    assert (sampled_images(model) - expected).abs().mean() > 1e-3
    with model.base():
        assert torch.equal(sampled_images(model), expected)


def test_default_adapters_cover_the_attention_of_image_and_text() -> None:
    """Of Stable Diffusion 3.5 medium: 243 square layers of width 1536, 13 blocks with a second attention."""
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=4,
            pos_embed_max_size=4,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
        network.requires_grad_(False)
        network.add_adapter(LoRA(rank=4).config(StableDiffusion3.family.lora_targets))
    layers = 24 * 4 + 13 * 4 + 24 * 3 + 23
    assert sum(value.numel() for value in network.parameters() if value.requires_grad) == layers * 4 * 2 * 1536


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=3, alpha=6.0, target_modules=["attn.to_q", "ff.net.2"])])
def test_saved_lora_gives_the_same_images_in_diffusers(tiny_sd3: Path, tmp_path: Path, lora: LoRA) -> None:
    model = stirred(tiny_sd3, lora=lora)
    file = tmp_path / "lora" / "last.safetensors"
    model.save_lora(file, {"step": "12"})
    pipeline = plain(tiny_sd3)
    base = pipeline_images(pipeline)
    pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(pipeline_images(pipeline), sampled_images(model), rtol=0, atol=1e-5)
    assert (sampled_images(model) - base).abs().mean() > 1e-3
    scaled = pipeline_images(pipeline, joint_attention_kwargs={"scale": 0.5})
    with model.adapter_scale(0.5):
        torch.testing.assert_close(scaled, sampled_images(model), rtol=0, atol=1e-5)
    with safe_open(file, "pt") as header:
        assert header.metadata()["step"] == "12"
        assert json.loads(header.metadata()["lora_adapter_metadata"])["transformer.r"] == lora.rank
    again = opened(tiny_sd3, lora=LoRA(rank=lora.rank, target_modules=lora.target_modules))
    again.load_lora(file)
    torch.testing.assert_close(sampled_images(again), sampled_images(model), rtol=0, atol=1e-5)


def test_load_lora_reads_files_written_by_diffusers(tiny_sd3: Path, tmp_path: Path) -> None:
    """The error says how to build a matching model; the targets exclude the second attention."""
    pipeline = plain(tiny_sd3)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn.to_q", "attn.add_k_proj"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    state = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(ValueError, match=r"LoRA\(rank=2, target_modules=\['add_k_proj', 'attn.to_q'\]\)"):
        opened(tiny_sd3).load_lora(file)
    model = opened(tiny_sd3, lora=LoRA(rank=2, target_modules=["add_k_proj", "attn.to_q"]))
    model.load_lora(file)
    torch.testing.assert_close(sampled_images(model), pipeline_images(pipeline), rtol=0, atol=1e-5)


def test_lora_of_another_family_is_rejected(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    StableDiffusion(str(tiny_sd)).save_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"adapts something other than .*\(unet"):
        opened(tiny_sd3).load_lora(tmp_path / "lora.safetensors")


# Training.


def module(model: StableDiffusion3, truncation: Truncation, **options: Any) -> DraftModule:
    """Towards red."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    return DraftModule(model, ColorBalance(), FlowEuler(4), truncation, optimizer=optimizer, **options)


def data() -> PromptDataModule:
    return PromptDataModule(["a red cat", "a cat", "red", "cat dog", "tree", "a dog"], batch_size=2, val_size=2)


def trainer_of(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "logger": False, "default_root_dir": folder, "num_sanity_val_steps": 0, **quiet}
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("truncation", [LastK(3), DRTune(2, m=2)], ids=["last_k", "drtune"])
def test_training_changes_only_the_adapters_and_raises_the_reward(
    tiny_sd3: Path, tmp_path: Path, truncation: Truncation, precision: Any
) -> None:
    """In float32, and with the frozen parts in bfloat16 under autocast."""
    dtype = "float32" if precision == "32-true" else "bfloat16"
    draft = module(opened(tiny_sd3, dtype=dtype, lora=LoRA(4, alpha=16.0, seed=0)), truncation)
    before = {name: value.detach().clone() for name, value in draft.named_parameters()}
    buffers = {name: value.clone() for name, value in draft.named_buffers()}
    trainer = trainer_of(tmp_path, max_steps=6, precision=precision)
    (first,) = trainer.validate(draft, data(), verbose=False)
    trainer.fit(draft, data())
    (last,) = trainer.validate(draft, data(), verbose=False)
    trained = draft.trainable_parameters()
    assert {value.dtype for value in trained.values()} == {torch.float32}
    # The last block drops the text, and so what its queries say.
    idle = {name for name in trained if "blocks.1.attn.add_q_proj" in name}
    for name, value in draft.named_parameters():
        assert value.dtype == before[name].dtype
        if name not in trained:
            assert value.dtype == getattr(torch, dtype)
            assert value.grad is None
            assert torch.equal(value, before[name]), name
        elif name not in idle:
            assert not torch.equal(value, before[name]), name
    assert all(torch.equal(value, buffers[name]) for name, value in draft.named_buffers())
    assert first["val/gain"] == 0
    assert last["val/gain"] > 0.001


def test_half_precision_is_close_to_float32(tiny_sd3: Path) -> None:
    whole, half = (sampled_images(opened(tiny_sd3, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.02


def test_callbacks_work_in_a_run(tiny_sd3: Path, tmp_path: Path) -> None:
    """Images, gradient norms per step, and adapters that diffusers opens."""
    draft = module(opened(tiny_sd3, lora=LoRA(4, seed=0)), LastK(2), kl_weight=0.1, checkpointing="both")
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    callbacks = [SampleLogger(every_n_steps=1), GradientNormMonitor(), LoRAExport()]
    trainer = trainer_of(tmp_path, *callbacks, logger=logger, max_steps=2, log_every_n_steps=1)
    trainer.fit(draft, data())
    assert trainer.callback_metrics["train/prediction_drift"] > 0
    pipeline = plain(tiny_sd3)
    pipeline.load_lora_weights(str(tmp_path / "run" / "lora" / "last.safetensors"))
    torch.testing.assert_close(pipeline_images(pipeline), sampled_images(draft.model), rtol=0, atol=1e-5)
    norms = [name for name in trainer.callback_metrics if "grad" in name]
    assert norms
    assert all(trainer.callback_metrics[name].isfinite() for name in norms)
    assert list((tmp_path / "run").rglob("*.png"))


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
    with pytest.raises(ValueError, match="is a single file.* give a diffusers pipeline folder"):
        StableDiffusion3(str(tmp_path / "model.safetensors"))


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
        ({"height": 18, "width": 16}, "height=18 must be a multiple of 4 up to 48 for this model; write 16"),
        ({"height": 16, "width": 52}, "width=52 must be a multiple of 4 up to 48"),
    ],
)
def test_invalid_arguments_are_rejected(tiny_sd3: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableDiffusion3(str(tiny_sd3), **arguments)
