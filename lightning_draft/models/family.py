"""Description of the pipelines of one model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lightning_draft.models.guidance import Rescale
from lightning_draft.models.latents import Latents
from lightning_draft.models.lora import ATTENTION
from lightning_draft.models.lora_names import ComfyNames
from lightning_draft.samplers import Sampler


@dataclass(frozen=True)
class Family:
    """A family of diffusers' text-to-image pipelines.

    Args:
        pipeline: Name of the pipeline class in diffusers, or the full path of a class in another package.
        title: Name of the family in messages, such as `Stable Diffusion 3 and 3.5`.
        example: Hub id of a model of the family.
        denoiser: Name of the denoiser among the pipeline's components.
        text_encoders: Names of the text encoders.
        guidance_scale: Default (published) scale of classifier-free guidance.
        embedded_guidance: Default guidance scale of denoisers that have it as an input.
        rescale_guidance: Function of guided and conditional predictions that returns the rescaled guided ones.
        latents: How its latents relate to images.
        vae: Name of the autoencoder; `None` for families that sample pixels.
        text_length: Number of tokens that the last text encoder reads by default; `None` for that of its tokenizer.
        max_text_length: Largest valid `text.max_length`.
        ragged_text: Whether the embeddings of prompts differ in length; `_network` finds them in `conditioning.ragged`.
        clip_skip: Whether `text.clip_skip` is supported.
        lora_targets: Layers that are adapted by default: the attention's projections.
        optional: Components that `omit` may name.
        unused: Components that are not loaded, as arguments of `from_pretrained`.
        single_file: Prefixes of the weights of each text encoder in single files, by its name. Text encoders without an
            entry are never read from the file; `None` if single files of the family are not supported.
        upcast_vae: Run an autoencoder with `force_upcast` in its config in float32, unless `memory.vae_dtype` is given.
        sampler: Builds the default sampler from a number of steps; by default `FlowEuler` for flows, else `DDIM`.
        steps: Default number of steps; by default 28 for flows, else 50.
        comfy: Names of the layers in the LoRA files that ComfyUI reads; `None` if they are not known.
    """

    pipeline: str
    title: str
    example: str
    denoiser: str
    text_encoders: tuple[str, ...]
    guidance_scale: float
    embedded_guidance: float | None = None
    rescale_guidance: Rescale | None = None
    latents: Latents = Latents()  # noqa: RUF009 (frozen)
    vae: str | None = "vae"
    text_length: int | None = None
    max_text_length: int | None = None
    ragged_text: bool = False
    clip_skip: bool = False
    lora_targets: tuple[str, ...] = ATTENTION
    optional: tuple[str, ...] = ()
    unused: Mapping[str, Any] = field(default_factory=dict)
    single_file: Mapping[str, str] | None = None
    upcast_vae: bool = False
    sampler: Callable[[int], Sampler] | None = None
    steps: int | None = None
    comfy: ComfyNames | None = None

    @property
    def pipeline_class(self) -> Any:
        """The pipeline class."""
        module, _, name = self.pipeline.rpartition(".")
        return getattr(import_module(module or "diffusers"), name)

    @property
    def pipeline_name(self) -> str:
        """The name of the pipeline class."""
        return self.pipeline.rpartition(".")[2]

    @property
    def loads_lora(self) -> bool:
        """Whether the pipeline class has `load_lora_weights`."""
        return hasattr(self.pipeline_class, "load_lora_weights")

    @property
    def opens_single_files(self) -> bool:
        """Whether the pipeline class has `from_single_file`; otherwise only the denoiser is read from single files."""
        return hasattr(self.pipeline_class, "from_single_file")

    @property
    def task(self) -> str:
        """The hub's name for what the pipeline does."""
        return "text-to-image" if self.text_encoders else "unconditional-image-generation"

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the components that are networks."""
        return (self.denoiser, *(() if self.vae is None else (self.vae,)), *self.text_encoders)
