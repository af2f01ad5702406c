"""The base model of LoRA files."""

from collections.abc import Sequence
from pathlib import Path

from lightning_draft import models
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora_files
from lightning_draft.models.loading import opener
from lightning_draft.models.pipeline import PipelineModel


def open_base(files: Sequence[Path], given: str | None) -> PipelineModel:
    """Return the base model, without adapters.

    Args:
        files: LoRA files.
        given: The model that the user gave; by default that in the header of the first file that names one.

    Raises:
        ConfigurationError: No header names a base model, or a file or the model cannot be opened.
    """
    headers = [lora_files.check(file)[1] for file in files]
    pretrained = given or next((header["base"] for header in headers if header.get("base")), None)
    if pretrained is None:
        raise ConfigurationError(f"{files[0]} does not name its base model; write --model NAME")
    model: PipelineModel = getattr(models, opener(pretrained) or "StableDiffusion")(pretrained, lora=None)
    return model
