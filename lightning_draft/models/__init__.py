"""Diffusion models; each family is a class in a file of its own, listed in `families.py`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_draft.models.base import Conditioning as Conditioning
from lightning_draft.models.base import DiffusionModel as DiffusionModel

if TYPE_CHECKING:
    from lightning_draft.models.decoder import Memory as Memory
    from lightning_draft.models.families import *  # noqa: F403
    from lightning_draft.models.family import Family as Family
    from lightning_draft.models.guidance import Guidance as Guidance
    from lightning_draft.models.lora import LoRA as LoRA
    from lightning_draft.models.pipeline import PipelineModel as PipelineModel

_MODULES = {
    "Family": "family",
    "Guidance": "guidance",
    "LoRA": "lora",
    "Memory": "decoder",
    "PipelineModel": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first used: diffusers takes seconds to import."""
    if name[:1].isupper():  # the name of a class; others are submodules, which Python imports itself
        module = import_module(f"{__name__}.{_MODULES.get(name, 'families')}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
