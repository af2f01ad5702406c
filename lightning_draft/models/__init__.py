"""Diffusion models, one wrapper a family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_draft.models.base import Conditioning, DiffusionModel

if TYPE_CHECKING:
    from lightning_draft.models.decoder import Memory
    from lightning_draft.models.guidance import Guidance
    from lightning_draft.models.lora import LoRA
    from lightning_draft.models.stable_diffusion import StableDiffusion
    from lightning_draft.models.stable_diffusion_3 import StableDiffusion3

__all__ = ["Conditioning", "DiffusionModel", "Guidance", "LoRA", "Memory", "StableDiffusion", "StableDiffusion3"]

_LATER = {
    "Guidance": "guidance",
    "LoRA": "lora",
    "Memory": "decoder",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "stable_diffusion_3",
}


def __getattr__(name: str) -> Any:
    """Import the wrappers when they are asked for: diffusers takes seconds to import."""
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
