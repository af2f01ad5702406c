"""Training and export of the denoiser's own weights."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from lightning_draft.callbacks import LoRAExport
from lightning_draft.chain import SamplingChain
from lightning_draft.cli.summary import closing_lines
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.models.trainable import check_trainable
from lightning_draft.objectives import PPO, PRDP
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

PROMPTS = ["a red cat", "dog"]


def noise() -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def sampled_images(model: StableDiffusion) -> Tensor:
    """Images of both prompts."""
    chain = SamplingChain(model, DDIM(3), model.encode(PROMPTS))
    return model.decode(chain.advance(chain.start(noise())).x)


def moved(folder: Path, trainable: Any = "full") -> StableDiffusion:
    """A model whose trained weights differ from the original ones."""
    model = StableDiffusion(str(folder), trainable=trainable, guidance=Guidance(2.0))
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return model


def test_full_trains_all_denoiser_weights_in_float32(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), trainable="full", dtype="bfloat16")
    names = {name for name, _ in model.trainable_parameters()}
    assert names == {name for name, _ in model.named_parameters() if name.startswith("unet.")}
    assert {value.dtype for _, value in model.trainable_parameters()} == {torch.float32}
    assert model.vae.dtype == torch.bfloat16


def test_names_select_weights_by_complete_name_parts(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), trainable=["attn2.to_k", "conv_out"])
    names = {name for name, _ in model.trainable_parameters()}
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("unet.") and (".attn2.to_k." in name or ".conv_out." in name)
    }
    assert names == expected
    assert any(".attn2.to_k." in name for name in names)
    with pytest.raises(
        ConfigurationError, match="'attn' is not in the name of any parameter of the denoiser; write full, lora"
    ):
        StableDiffusion(str(tiny_sd), trainable=["attn"])


@pytest.mark.parametrize("trainable", ["attn2", []])
def test_single_name_and_empty_list_are_rejected(trainable: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be lora, full, or a list of names such as \[attn2\]"):
        check_trainable(trainable)


@pytest.mark.parametrize("trainable", ["full", ["attn1"]])
def test_base_equals_the_original_pipeline_bitwise(tiny_sd: Path, trainable: Any) -> None:
    model = moved(tiny_sd, trainable)
    bare = StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(2.0))
    before = dict(model.trainable_parameters())
    tuned = sampled_images(model)
    with model.base():
        assert torch.equal(sampled_images(model), sampled_images(bare))
        assert not model.trainable_parameters()
    assert all(value is before[name] for name, value in model.trainable_parameters())
    assert torch.equal(sampled_images(model), tuned)
    assert (tuned - sampled_images(bare)).abs().mean() > 1e-3


def test_base_within_a_graph_does_not_change_its_gradient(tiny_sd: Path) -> None:
    model = moved(tiny_sd)
    conditioning = model.encode(PROMPTS)
    parameters = [value for _, value in model.trainable_parameters()]

    def gradients(visit: bool) -> tuple[Tensor, ...]:
        output = model(noise(), 500, conditioning)
        if visit:
            with model.base(), torch.no_grad():
                model(noise(), 500, conditioning)
        return torch.autograd.grad(output.square().sum(), parameters)

    assert all(map(torch.equal, gradients(visit=True), gradients(visit=False)))


def test_scale_interpolates_between_original_and_trained_weights(tiny_sd: Path) -> None:
    model, bare = moved(tiny_sd), StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(2.0))
    trained = dict(model.named_parameters())
    for name, value in bare.named_parameters():
        value.data += 0.3 * (trained[name].detach() - value)
    with model.adapter_scale(0.3):
        torch.testing.assert_close(sampled_images(model), sampled_images(bare), rtol=0, atol=1e-4)


def test_saved_pipeline_gives_the_same_images_in_diffusers(tiny_sd: Path, tmp_path: Path) -> None:
    model = moved(tiny_sd, ["attn1", "conv_out"])
    model.save_pipeline(tmp_path / "tuned", {"step": "3"})
    model.save_pipeline(tmp_path / "tuned", {"step": "4"})
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    assert json.loads((tmp_path / "tuned" / "training.json").read_text()) == {"step": "4"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    options = {"guidance_scale": 2.0, "num_inference_steps": 3, "latents": noise(), "output_type": "pt"}
    theirs = pipeline(PROMPTS, **options).images
    torch.testing.assert_close(theirs, sampled_images(model).clamp(0, 1), rtol=0, atol=2e-4)
    assert torch.equal(
        sampled_images(StableDiffusion(str(tmp_path / "tuned"), lora=None, guidance=Guidance(2.0))),
        sampled_images(model),
    )


def test_wrong_export_is_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="save_pipeline needs .*trainable='full', or write the adapters"):
        StableDiffusion(str(tiny_sd), lora=LoRA(2)).save_pipeline(tmp_path / "tuned")
    with pytest.raises(ConfigurationError, match="save_lora needs adapters"):
        StableDiffusion(str(tiny_sd), trainable="full").save_lora(tmp_path / "lora.safetensors")


def module(method: str, model: StableDiffusion) -> RewardModule:
    """Methods that use the original weights."""
    common: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3)}
    if method == "draft":
        return DraftModule(model, ColorBalance(), DDIM(3), LastK(1), kl_weight=0.1, **common)
    objective = PRDP() if method == "prdp" else PPO()
    options = {"objective": objective, "samples_per_prompt": 2, "kl_weight": 0.0 if method == "prdp" else 0.1}
    return PolicyGradientModule(model, ColorBalance(), DDIM(3, eta=1.0), **options, **common)


@pytest.mark.parametrize(
    ("method", "trainable"),
    [("draft", "full"), ("draft", ["attn2"]), ("ppo", ["attn2"]), ("prdp", ["attn2"])],
    ids=str,
)
def test_methods_train_weights_and_resumed_run_equals_uninterrupted_run(
    tiny_sd: Path, tmp_path: Path, method: str, trainable: Any
) -> None:
    def fit(steps: int, folder: str, resume: Path | None = None) -> RewardModule:
        model = StableDiffusion(str(tiny_sd), trainable=trainable, guidance=Guidance(1.0))
        tuned = module(method, model)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            default_root_dir=tmp_path / folder,
            callbacks=[LoRAExport(every_n_steps=1)] if folder == "whole" else [],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(tuned, PromptDataModule(PROMPTS * 2, batch_size=2, val_size=1), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return tuned

    whole = fit(4, "whole")
    fit(2, "first")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == whole.trainable_parameters().keys()
    resumed = fit(4, "second", tmp_path / "first.ckpt")
    ours, original = resumed.trainable_parameters(), StableDiffusion(str(tiny_sd), lora=None).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in whole.trainable_parameters().items())
    assert any(not torch.equal(value, original[name.removeprefix("model.")]) for name, value in ours.items())
    lines = list(closing_lines(whole.trainer, whole, tmp_path / "whole"))
    assert lines[0] == f"pipelines:  {tmp_path / 'whole/lora/best'}  {tmp_path / 'whole/lora/last'}"
    assert lines[-1].strip() == f'pipe = StableDiffusionPipeline.from_pretrained("{tmp_path / "whole/lora/best"}")'
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "lora" / "last").unet.state_dict()
    for name, value in exported.items():
        expected = ours.get(f"model.unet.{name}", original[f"unet.{name}"])
        assert torch.equal(value, expected.detach()), name
    moved_names = [name for name, value in exported.items() if not torch.equal(value, original[f"unet.{name}"])]
    assert ("conv_in.weight" in moved_names) == (trainable == "full")
