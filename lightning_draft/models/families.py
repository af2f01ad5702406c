"""The table of all model families. A new family is a file and an entry here; this module imports none of them."""

from typing import NamedTuple


class Entry(NamedTuple):
    """Properties of a model class that are needed before it is imported.

    Attributes:
        module: Module that defines the class.
        pipelines: Names of the classes of diffusers' pipelines that it opens.
        layouts: Prefixes of the names that `layout_of` gives to the architectures of single files of the family.
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
    "Flux": Entry("lightning_draft.models.flux", ("FluxPipeline", "FluxImg2ImgPipeline"), ("flux-dev", "flux-schnell")),
    "ZImage": Entry("lightning_draft.models.z_image", ("ZImagePipeline", "ZImageImg2ImgPipeline"), ("z-image-turbo",)),
    "Flux2Klein": Entry("lightning_draft.models.flux_2_klein", ("Flux2KleinPipeline",), ("flux-2-klein",)),
    "QwenImage": Entry(
        "lightning_draft.models.qwen_image", ("QwenImagePipeline", "QwenImageImg2ImgPipeline"), ("qwen_image",)
    ),
    "PixArtSigma": Entry("lightning_draft.models.pixart_sigma", ("PixArtSigmaPipeline",), ("pixart",)),
    "Sana": Entry("lightning_draft.models.sana", ("SanaPipeline",), ("sana",)),
    "SanaSprint": Entry("lightning_draft.models.sana_sprint", ("SanaSprintPipeline",)),
    "Chroma": Entry("lightning_draft.models.chroma", ("ChromaPipeline",), ("chroma",)),
    "PixelDiffusion": Entry("lightning_draft.models.pixels", ("DDPMPipeline", "DDIMPipeline")),
}
"""Entries by class name. Another package can add an entry when it is imported."""


def class_for_pipeline(pipeline: str) -> str | None:
    """Return the name of the model class that opens a pipeline class of this name."""
    return next((name for name, entry in FAMILIES.items() if pipeline in entry.pipelines), None)


def class_for_layout(layout: str) -> str | None:
    """Return the name of the model class for single files of this architecture, by diffusers' name."""
    return next((name for name, entry in FAMILIES.items() if layout.startswith(entry.layouts)), None)
