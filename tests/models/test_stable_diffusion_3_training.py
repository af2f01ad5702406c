"""Adapters of Stable Diffusion 3 and short training runs."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import SD3Transformer2DModel
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open

from lightning_draft.callbacks import GradientNormMonitor, LoRAExport, SampleLogger
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import (
    LoRA,
    StableDiffusion,
    StableDiffusion3,
)
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import FlowEuler
from lightning_draft.truncation import DRTune, LastK, Truncation
from tests.tiny_stable_diffusion_3 import opened, pipeline_images, plain, sampled_images, stirred


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
