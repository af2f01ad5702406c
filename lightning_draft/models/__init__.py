"""Diffusion models, one wrapper a family."""

from typing import TYPE_CHECKING, Any

from lightning_draft.models.base import Conditioning, DiffusionModel

if TYPE_CHECKING:
    from lightning_draft.models.lora import LoRA
    from lightning_draft.models.stable_diffusion import StableDiffusion

__all__ = ["Conditioning", "DiffusionModel", "LoRA", "StableDiffusion"]


def __getattr__(name: str) -> Any:
    """Import the wrappers when they are asked for: diffusers takes seconds to import."""
    if name == "LoRA":
        from lightning_draft.models.lora import LoRA

        return LoRA
    if name == "StableDiffusion":
        from lightning_draft.models.stable_diffusion import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
