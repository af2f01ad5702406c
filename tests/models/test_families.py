"""One battery for the newer model families: each is compared with diffusers' own pipeline on a small random one."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lightning_draft
from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import (
    Conditioning,
    Guidance,
    LoRA,
    PipelineModel,
    QwenImage,
    StableDiffusion,
    TextEncoding,
)
from lightning_draft.models.families import FAMILIES
from lightning_draft.models.family import Family
from lightning_draft.models.latents import pack, unpack
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import DDIM, FlowEuler, FlowSDE, Sampler
from lightning_draft.stochastic_flow import FlowCPS
from lightning_draft.truncation import LastK
from lightning_draft.weightless import without_weights
from tests.tiny_families import WRITERS, write
from tests.tiny_flux_2 import flux_2_klein

PROMPTS = ["a red cat", "dog, cat"]
STEPS = 3


@dataclass(frozen=True)
class Case:
    """How a family's tiny pipeline is opened and called.

    Args:
        model: Name of the class.
        prompts: Two prompts.
        flow: Whether it is a rectified flow.
        guidance: Name of the pipeline's argument for classifier-free guidance; `None` if it has none.
        options: Of the model.
        call: More arguments of the pipeline's call.
        side: Height and width of a square image; the other image is twice as wide.
        negative: The pipeline's arguments for negative prompts, from the pipeline and the prompts.
        guided: The pipeline's value for our guidance scale.
        consistency: Whether the noise is renewed at each step.
    """

    model: str
    prompts: tuple[str, str] = ("a red cat", "dog, cat")
    flow: bool = True
    guidance: str | None = "guidance_scale"
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    side: int = 16
    negative: Callable[[Any, list[str]], dict[str, Any]] = lambda pipeline, prompts: {"negative_prompt": prompts}
    guided: Callable[[float], float] = float
    consistency: bool = False

    @property
    def size(self) -> dict[str, int]:
        """The options for the size; pixels have that of their network."""
        return {} if self.model == "PixelDiffusion" else {"height": self.side, "width": self.side}


OPTIONS = {"text": TextEncoding(12)}
CALL = {"max_sequence_length": 12}
UNBINNED = {"use_resolution_binning": False, **CALL}
CASES = {
    "flux": Case("Flux", guidance="true_cfg_scale", options=OPTIONS, call=CALL),
    "flux_schnell": Case("Flux", guidance="true_cfg_scale", options=OPTIONS, call=CALL),
    "flux_2_klein": Case(
        "Flux2Klein",
        options={"text": TextEncoding(40)},
        call={"max_sequence_length": 40},
        negative=lambda pipeline, prompts: {
            "negative_prompt_embeds": pipeline.encode_prompt(prompts, None, 1, None, 40)[0]
        },
    ),
    "pixart_sigma": Case("PixArtSigma", flow=False, options=OPTIONS, call={**UNBINNED, "clean_caption": False}),
    "sana": Case("Sana", options=OPTIONS, call=UNBINNED, side=32),
    "sana_sprint": Case(
        "SanaSprint",
        guidance=None,
        options=OPTIONS,
        call={**UNBINNED, "intermediate_timesteps": None, "max_timesteps": math.pi / 2},  # by default rounded, 1.5708
        side=32,
        consistency=True,
    ),
    "chroma": Case("Chroma", options=OPTIONS, call=CALL),
    "z_image": Case(
        "ZImage",
        ("a red cat", "a dog that sleeps below a tree"),
        options={"text": TextEncoding(64)},
        call={"max_sequence_length": 64},
        guided=lambda scale: scale - 1,
    ),
    "qwen_image": Case("QwenImage", guidance="true_cfg_scale"),
    "pixels": Case("PixelDiffusion", flow=False, guidance=None),
    "pixels_of_classes": Case("PixelDiffusion", flow=False, guidance=None, prompts=("3", "7")),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write each pipeline when it is first used."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write(name, root / name)

    return folder


def opened(folder: Path, case: Case, **options: Any) -> PipelineModel:
    """A model whose adapters, if any, do something."""
    arguments = {**case.size, **case.options, **options}
    model: PipelineModel = getattr(lightning_draft, case.model)(str(folder), **arguments)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


def plain(folder: Path, case: Case) -> Any:
    """The pipeline as diffusers opens it."""
    return prepared(getattr(lightning_draft, case.model).family.pipeline_class.from_pretrained(folder), case)


def prepared(pipeline: Any, case: Case) -> Any:
    """A pipeline with our sampler's steps."""
    if not case.flow:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampler(case: Case, stochastic: bool = False) -> Sampler:
    """Of a few steps."""
    if case.consistency:
        return FlowCPS(STEPS, noise_level=1.0)
    if case.flow:
        return FlowSDE(STEPS) if stochastic else FlowEuler(STEPS)
    return DDIM(STEPS, eta=1.0 if stochastic else 0.0)


def starting_noise(model: PipelineModel) -> Tensor:
    """Fixed starting latents of both prompts."""
    return model.noise(2, torch.Generator().manual_seed(7))


@torch.no_grad()
def images(model: PipelineModel, case: Case, steps: Sampler | None = None) -> Tensor:
    """Images of both prompts."""
    chain = SamplingChain(model, steps or sampler(case), model.encode(case.prompts))
    torch.manual_seed(11)
    return model.decode(chain.advance(chain.start(starting_noise(model))).x)


@torch.no_grad()
def diffusers_images(
    pipeline: Any, model: PipelineModel, case: Case, scale: float = 1.0, negative: str = "", **call: Any
) -> Tensor:
    """The same from diffusers, from the same noise."""
    if not case.size:
        return _ddim_images(pipeline, model, case)
    noise = starting_noise(model)
    latents = model.family.latents
    height, width = model.image_size
    torch.manual_seed(11)  # of the noise of the steps
    output = pipeline(
        prompt=list(case.prompts),
        height=height,
        width=width,
        latents=pack(noise) if latents.packed else noise,
        output_type="pt",
        **({} if scale == 1 or case.guidance is None else case.negative(pipeline, [negative] * 2)),
        **({} if case.guidance is None else {case.guidance: case.guided(scale)}),
        **{"num_inference_steps": STEPS, **case.call, **call},
    )
    result: Tensor = output.images
    return result


def _ddim_images(pipeline: Any, model: PipelineModel, case: Case) -> Tensor:
    """Sample with diffusers' scheduler: its pipelines for pixels take no starting noise and no class."""
    x = starting_noise(model)
    labels = None if pipeline.unet.config.num_class_embeds is None else torch.tensor([int(p) for p in case.prompts])
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(pipeline.unet(x, t, class_labels=labels).sample, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_the_diffusers_pipeline(folders: Callable, name: str) -> None:
    """With guidance on and off, a negative prompt, two different prompts, and at a non-square size."""
    case, folder = CASES[name], folders(name)
    pipeline, wide = plain(folder, case), case.side * 2
    variants: list[tuple[Guidance, tuple[int, int]]] = [(Guidance(1.0), (case.side, case.side))]
    if case.guidance is None and case.size:
        variants += [(Guidance(1.0), (case.side, wide))]
    if case.guidance is not None:
        variants += [(Guidance(3.0), (case.side, case.side)), (Guidance(3.0, "tree"), (case.side, wide))]
    seen = []
    for guidance, (height, width) in variants:
        size = {"height": height, "width": width} if case.size else {}
        model = opened(folder, case, lora=None, guidance=guidance, **size)
        ours = images(model, case)
        theirs = diffusers_images(pipeline, model, case, guidance.scale or 1.0, guidance.negative_prompt)
        assert ours.shape == (2, 3, height, width)
        torch.testing.assert_close(ours.clamp(0, 1), theirs, rtol=0, atol=2e-5)
        assert ((ours > 0) & (ours < 1)).float().mean() > 0.05
        assert name == "pixels" or (ours[0] - ours[1]).abs().max() > 1e-3
        seen.append(ours)
    assert all((other[..., : case.side] - seen[0]).abs().max() > 1e-3 for other in seen[1:])


def with_peft(folder: Path, family: Family, file: Path) -> Any:
    """Return a pipeline without `load_lora_weights` in which the code of docs/lora.md has loaded a LoRA file."""
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"^```python.*?\n(.*?)^```", page, re.DOTALL | re.M) if "peft" in block]
    changes = {
        "DDPMPipeline": family.pipeline_name,
        "google/ddpm-cifar10-32": str(folder),
        "runs/ddpm_cifar10_color/lora/best.safetensors": str(file),
        "unet": family.denoiser,
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["pipe"]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_lora_gives_our_images_in_a_plain_pipeline(folders: Callable, name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], folders(name)
    model = opened(folder, case, lora=LoRA(4, alpha=6.0), guidance=Guidance(2.0 if case.guidance else 1.0))
    model.save_lora(tmp_path / "lora.safetensors")
    pipeline = plain(folder, case)
    base = diffusers_images(pipeline, model, case, 2.0)
    if model.family.loads_lora:
        pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    else:
        pipeline = prepared(with_peft(folder, model.family, tmp_path / "lora.safetensors"), case)
    ours = images(model, case).clamp(0, 1)
    torch.testing.assert_close(ours, diffusers_images(pipeline, model, case, 2.0), rtol=0, atol=2e-4)
    assert (ours - base).abs().mean() > 0.001


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


def method(kind: str, model: PipelineModel, case: Case) -> RewardModule:
    """A direct method or a policy gradient."""
    if kind == "last_k":
        return DraftModule(model, ColorBalance(), sampler(case), LastK(2))
    return PolicyGradientModule(model, ColorBalance(), sampler(case, stochastic=True), samples_per_prompt=2)


@pytest.mark.parametrize(("kind", "dtype"), [("last_k", "bfloat16"), ("ppo", "float32")])
@pytest.mark.parametrize("name", CASES)
def test_training_changes_the_adapters_alone(
    folders: Callable, name: str, kind: str, dtype: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    guidance = Guidance(1.0 if case.guidance is None else 2.0)
    model = opened(folders(name), case, dtype=dtype, guidance=guidance, lora=LoRA(2, seed=0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(method(kind, model, case), PromptDataModule([*case.prompts] * 2, batch_size=2, val_size=1))
    trained = {key for key, _ in model.trainable_parameters()}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert trained
    assert changed == trained
    assert {before[key].dtype for key in trained} == {torch.float32}


@pytest.mark.parametrize("name", CASES)
def test_the_right_class_is_named_for_a_pipeline_of_another_family(folders: Callable, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"open it with {CASES[name].model}$"):
        StableDiffusion(str(folders(name)))


def test_every_family_has_a_case() -> None:
    tested_elsewhere = {"StableDiffusion", "StableDiffusionXL", "StableDiffusion3"}
    assert {case.model for case in CASES.values()} | tested_elsewhere == set(FAMILIES)
    assert set(CASES) == set(WRITERS)


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


def test_guidance_of_pixels_is_rejected(folders: Callable) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance.scale=2.0 needs prompts.*write 1"):
        opened(folders("pixels"), CASES["pixels"], guidance=Guidance(2.0))


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
