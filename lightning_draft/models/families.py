"""The table of all model families: a new one is its own file and one entry here. This module imports none of them."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What is known about a model class before it is imported.

    Attributes:
        module: Where the class is defined.
        pipelines: Names of the classes of diffusers' pipelines that it opens.
        layouts: Beginnings of diffusers' names for the architectures of single files that belong to it.
    """

    module: str
    pipelines: tuple[str, ...]
    layouts: tuple[str, ...] = ()


FAMILIES: dict[str, Entry] = {
    "StableDiffusion": Entry(
        "lightning_draft.models.stable_diffusion",
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        ("v1", "v2"),
    ),
    "StableDiffusionXL": Entry(
        "lightning_draft.models.stable_diffusion_xl",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        ("xl_base", "playground"),
    ),
    "StableDiffusion3": Entry(
        "lightning_draft.models.stable_diffusion_3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        ("sd3",),
    ),
}
"""By class name. A package with a family of its own may add an entry when it is imported."""


def class_for_pipeline(pipeline: str) -> str | None:
    """Return the name of the model class that opens a pipeline class of this name."""
    return next((name for name, entry in FAMILIES.items() if pipeline in entry.pipelines), None)


def class_for_layout(layout: str) -> str | None:
    """Return the name of the model class for single files with an architecture that diffusers calls so."""
    return next((name for name, entry in FAMILIES.items() if layout.startswith(entry.layouts)), None)
