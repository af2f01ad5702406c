"""Diffusion models; each family is a class in a separate file, listed in `families.py`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_draft.models.families import FAMILIES

if TYPE_CHECKING:
    from lightning_draft.models.base import Conditioning as Conditioning
    from lightning_draft.models.base import DiffusionModel as DiffusionModel
    from lightning_draft.models.decoder import Memory as Memory
    from lightning_draft.models.family import Family as Family
    from lightning_draft.models.guidance import Guidance as Guidance
    from lightning_draft.models.lora import LoRA as LoRA
    from lightning_draft.models.pipeline import PipelineModel as PipelineModel
    from lightning_draft.models.text_encoding import TextEncoding as TextEncoding

_MODULES = {
    "Conditioning": "lightning_draft.models.base",
    "DiffusionModel": "lightning_draft.models.base",
    "Family": "lightning_draft.models.family",
    "Guidance": "lightning_draft.models.guidance",
    "LoRA": "lightning_draft.models.lora",
    "Memory": "lightning_draft.models.decoder",
    "PipelineModel": "lightning_draft.models.pipeline",
    "TextEncoding": "lightning_draft.models.text_encoding",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first used: diffusers takes seconds to import."""
    module = FAMILIES[name].module if name in FAMILIES else _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
