"""How the small pipelines of the newer model families are opened and called, here and in diffusers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import lightning_draft
from lightning_draft.chain import SamplingChain
from lightning_draft.models import PipelineModel, TextEncoding
from lightning_draft.models.latents import pack
from lightning_draft.samplers import DDIM, FlowEuler, FlowSDE, Sampler
from lightning_draft.stochastic_flow import FlowCPS

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
