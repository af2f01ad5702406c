"""Negative prompts of single prompts, clip skip and textual inversions, against diffusers' pipeline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Conditioning, Guidance, LoRA, StableDiffusion, StableDiffusionXL, TextEncoding
from lightning_draft.prompt import Prompt
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK

PROMPTS = [Prompt("a red cat", {"negative_prompt": "tree"}), Prompt("dog, cat", {"negative_prompt": "red"})]
GUIDANCE = Guidance(3.0, "blurry")


def noise() -> Tensor:
    """Fixed starting latents."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def images(model: StableDiffusion, prompts: list[Any]) -> Tensor:
    """Our images of two prompts."""
    chain = SamplingChain(model, DDIM(3), model.encode(prompts))
    return model.decode(chain.advance(chain.start(noise())).x).clamp(0, 1)


def diffusers_images(folder: Path, prompts: list[Any], **options: Any) -> Tensor:
    """The same from the pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):  # transformers 5.6 and newer; diffusers 0.42 needs it
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    call = {"latents": noise(), "guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt", **options}
    result: Tensor = pipeline([*map(str, prompts)], **call).images
    return result


def test_negative_prompts_without_guidance_are_a_warning(tiny_sd: Path) -> None:
    with pytest.warns(UserWarning, match=r"guidance\.negative_prompt has no effect"):
        model = StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(1.0, "blurry"))
    with pytest.warns(UserWarning, match="the column 'negative_prompt' has no effect"):
        model.precompute(PROMPTS)


def test_each_prompt_can_have_its_own_negative_prompt(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), lora=None, guidance=GUIDANCE)
    ours, plain = images(model, PROMPTS), images(model, [*map(str, PROMPTS)])
    theirs = diffusers_images(tiny_sd, PROMPTS, negative_prompt=["tree", "red"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (ours - plain).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("own", [None, "", " "])
def test_a_prompt_without_its_own_negative_prompt_has_that_of_the_run(own: str | None) -> None:
    assert GUIDANCE.negative_prompt_of(Prompt("a cat", {"negative_prompt": own})) == "blurry"
    assert GUIDANCE.negative_prompt_of("a cat") == "blurry"


def test_a_negative_prompt_that_is_no_string_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match=r"prompt 'a cat' has 3 \(int\) in the column 'negative_prompt'"):
        GUIDANCE.negative_prompt_of(Prompt("a cat", {"negative_prompt": 3}))


def test_the_column_of_a_prompt_file_reaches_the_network(tiny_sd: Path, tmp_path: Path) -> None:
    """Also after the text encoder was freed."""
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,negative_prompt\na red cat,tree\na red cat,\ndog,red\n")
    model = StableDiffusion(str(tiny_sd), lora=None, guidance=GUIDANCE)
    data = PromptDataModule(file, batch_size=3, val_size=0)
    model.precompute(data.train_prompts)
    model.release_text_encoder()
    negative = model.encode(list(data.train_prompts)).negative
    fresh = StableDiffusion(str(tiny_sd), lora=None, guidance=GUIDANCE)
    expected = [fresh._embed(text, negative=True)["text"] for text in ("tree", "blurry", "red")]
    assert negative is not None
    torch.testing.assert_close(negative.tensors["text"], torch.stack(expected))


def test_clip_skip_gives_the_images_of_the_pipeline(tiny_sd: Path) -> None:
    """Of prompts alone: the pipeline reads negative prompts without it."""
    model = StableDiffusion(str(tiny_sd), lora=None, guidance=GUIDANCE, text=TextEncoding(clip_skip=1))
    ours = images(model, PROMPTS)
    theirs = diffusers_images(tiny_sd, PROMPTS, negative_prompt=["tree", "red"], clip_skip=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (ours - images(StableDiffusion(str(tiny_sd), lora=None, guidance=GUIDANCE), PROMPTS)).abs().max() > 1e-3


def test_a_textual_inversion_of_several_vectors_gives_the_images_of_the_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    """In prompts and in negative prompts; a folder keeps the vectors that were loaded into it."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    vectors = {"<cat>": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}
    pipeline.load_textual_inversion(vectors, token="<cat>")
    pipeline.save_pretrained(tmp_path / "inverted")
    prompts = ["a <cat>", "red, <cat>"]
    model = StableDiffusion(str(tmp_path / "inverted"), lora=None, guidance=Guidance(3.0, "dog <cat>"))
    ours = images(model, prompts)
    theirs = diffusers_images(tmp_path / "inverted", prompts, negative_prompt=["dog <cat>"] * 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    single = images(model, ["a <cat>_1", "red, <cat>_1"])
    assert (ours - single).abs().max() > 1e-3


def test_a_clip_skip_of_all_layers_is_rejected(tiny_sdxl: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"text.clip_skip=2 must be between 0 and 1.*; write 1"):
        StableDiffusionXL(str(tiny_sdxl), text=TextEncoding(clip_skip=2))


METHODS: dict[str, Callable[[StableDiffusion], RewardModule]] = {
    "draft": lambda model: DraftModule(model, ColorBalance(), DDIM(2), LastK(1)),
    "policy": lambda model: PolicyGradientModule(model, ColorBalance(), DDIM(2, eta=1.0), samples_per_prompt=2),
    "forward": lambda model: ForwardProcessModule(model, ColorBalance(), DDIM(2), samples_per_prompt=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_its_validation_use_the_own_negative_prompts(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[str] = []
    encode = StableDiffusion.encode

    def noted(model: StableDiffusion, prompts: Sequence[str]) -> Conditioning:
        seen.extend(GUIDANCE.negative_prompt_of(prompt) for prompt in prompts)
        return encode(model, prompts)

    monkeypatch.setattr(StableDiffusion, "encode", noted)
    model = StableDiffusion(str(tiny_sd), lora=LoRA(2, seed=0), guidance=GUIDANCE)
    rows = [{"prompt": f"a {letter}", "negative_prompt": f"no {letter}"} for letter in "abcd"]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(METHODS[name](model), PromptDataModule(rows, rows, batch_size=4))
    assert set(seen) == {f"no {letter}" for letter in "abcd"}
    assert len(seen) >= 12  # validation before training, the step, and validation after it
