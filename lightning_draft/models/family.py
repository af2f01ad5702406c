"""Description of the pipelines of one model family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from diffusers import DiffusionPipeline

from lightning_draft.models.lora import ATTENTION


@dataclass(frozen=True)
class Family:
    """A family of diffusers' text-to-image pipelines.

    Args:
        pipeline_class: The class of diffusers that opens them.
        title: Their name in messages, such as `Stable Diffusion 3 and 3.5`.
        example: Hub id of one of them.
        denoiser: Name of the denoiser among the pipeline's components.
        text_encoders: Names of the text encoders.
        guidance_scale: Default scale of classifier-free guidance, the published one.
        lora_targets: Layers that are adapted by default: the attention's projections.
        also_opens: Names of other pipeline classes with the same components, such as image-to-image.
        unused: Components that are not loaded, as arguments of `from_pretrained`.
        single_file: The same as arguments of `from_single_file`; `None` if single files lack components.
        single_file_layouts: Beginnings of diffusers' names for the architectures of its single files.
    """

    pipeline_class: type[DiffusionPipeline]
    title: str
    example: str
    denoiser: str
    text_encoders: tuple[str, ...]
    guidance_scale: float
    lora_targets: tuple[str, ...] = ATTENTION
    also_opens: tuple[str, ...] = ()
    unused: Mapping[str, Any] = field(default_factory=dict)
    single_file: Mapping[str, Any] | None = None
    single_file_layouts: tuple[str, ...] = ()

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the components that are networks."""
        return (self.denoiser, "vae", *self.text_encoders)

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Names of the pipeline classes that it opens."""
        return (self.pipeline_class.__name__, *self.also_opens)


_WRAPPERS: dict[str, type] = {}
_LAYOUTS: dict[str, type] = {}


def register(family: Family, wrapper: type) -> None:
    """Remember which model class opens the pipelines of a family."""
    _WRAPPERS.update(dict.fromkeys(family.pipelines, wrapper))
    _LAYOUTS.update(dict.fromkeys(family.single_file_layouts, wrapper))


def wrapper_for(pipeline: str) -> Any:
    """Return the model class that opens a pipeline class of this name, or `None`."""
    import_module("lightning_draft.models.families")
    return _WRAPPERS.get(pipeline)


def wrapper_for_file(layout: str) -> Any:
    """Return the model class that opens single files with an architecture that diffusers calls so, or `None`."""
    import_module("lightning_draft.models.families")
    return next((wrapper for start, wrapper in _LAYOUTS.items() if layout.startswith(start)), None)
