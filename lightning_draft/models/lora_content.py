"""The content of a LoRA file, and the pipeline that it adapts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_draft.models.family import Family
from lightning_draft.models.lora_update import Update

Updates = Mapping[str, Update]


@dataclass(frozen=True)
class LoRABase:
    """The pipeline that a LoRA file adapts.

    Args:
        family: Its family.
        config: Config of its denoiser.
        pretrained: Where it was loaded from, as for `PipelineModel`.
        name: Its name without local folders, which is written to headers.
        pretrained_config: As for `PipelineModel`.
    """

    family: Family
    config: Any
    pretrained: str
    name: str
    pretrained_config: str | None = None


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA file.

    Args:
        path: The file.
        base: The pipeline that it adapts.
        denoiser: Updates of the denoiser by layer.
        encoders: Updates of the text encoders by component and layer.
        metadata: Text of the header, without peft's settings.
    """

    path: Path
    base: LoRABase
    denoiser: Updates
    encoders: Mapping[str, Updates] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank in the denoiser."""
        return max(update.rank for update in self.denoiser.values())

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers of the denoiser."""
        return sorted(self.denoiser)

    @property
    def updates(self) -> dict[str, Updates]:
        """Updates by component of the pipeline and layer."""
        return {self.base.family.denoiser: self.denoiser, **self.encoders}
