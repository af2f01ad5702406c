"""Diffusion models in pixel space, unconditional or class-conditional.

References:
    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving


class PixelDiffusion(PipelineModel):
    """A `UNet2DModel` in pixel space, as in DDPM and DDIM pipelines; arguments as of `PipelineModel`.

    An unconditional network accepts any prompt and does not read it. A network with `num_class_embeds` reads prompts as
    class numbers, such as `7`. The scheduler's `clip_sample` is not applied, because
    clipped values have no gradient.

    Attributes:
        unet: The denoiser.
    """

    family = Family(
        pipeline="DDPMPipeline",
        title="pixel-space diffusion",
        example="google/ddpm-cifar10-32",
        denoiser="unet",
        text_encoders=(),
        guidance_scale=1.0,
        vae=None,
    )

    def _configure(self, pipeline: Any) -> None:
        if self.guidance.enabled:
            raise ConfigurationError(
                f"guidance.scale={self.guidance.scale} needs prompts, and {self.family.title} models have none; write 1"
            )
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the class number, a scalar; 0 for an unconditional network.

        Raises:
            ConfigurationError: The prompt is not the number of a class.
        """
        classes = self.denoiser.config.num_class_embeds
        if classes is None:
            return {"class": torch.tensor(0)}
        if not prompt.strip().isdecimal() or int(prompt) >= classes:
            raise ConfigurationError(
                f"prompt {prompt!r} must be the number of a class of this model, 0 to {classes - 1}, such as '0'"
            )
        return {"class": torch.tensor(int(prompt))}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        labels = None if self.denoiser.config.num_class_embeds is None else conditioning.tensors["class"]
        output: Tensor = self.denoiser(x, time, class_labels=labels, return_dict=False)[0]
        return output
