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
    class numbers, such as `7`. Gray images are returned as RGB images with equal channels. If the network also predicts
    variances, they are not used: the sampler sets the variance of its steps. The scheduler's `clip_sample` is not
    applied, because clipped values have no gradient.

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

    def decode(self, latents: Tensor) -> Tensor:
        """Return `x / 2 + 1/2` as RGB images `(B, 3, H, W)`, in [0, 1] by convention and not clamped."""
        return super().decode(latents).expand(-1, 3, -1, -1)

    def default_prompts(self, count: int) -> list[str]:
        """Return the first class numbers; for an unconditional network `count` names of images."""
        classes = self.denoiser.config.num_class_embeds
        if classes is None:
            return [f"image {number + 1}" for number in range(count)]
        return [str(number) for number in range(min(count, classes))]

    def _configure(self, pipeline: Any) -> None:
        if self.guidance.enabled:
            raise ConfigurationError(
                f"guidance.scale={self.guidance.scale} cannot be used with {self.family.title} models, which "
                "read no text and so have no prediction for a negative prompt; write 1, or leave guidance.scale out"
            )
        self._check_network()
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)

    def _check_network(self) -> None:
        """Check the channels, the classes and the image size.

        Raises:
            ConfigurationError: They are not supported.
        """
        config = self.denoiser.config
        if config.in_channels not in (1, 3):
            raise ConfigurationError(
                f"in_channels={config.in_channels} of the pipeline's unet is not supported: rewards need images with 1 "
                "or 3 channels; give a pipeline of gray or RGB images"
            )
        if config.get("class_embed_type") is not None:
            raise ConfigurationError(
                f"class_embed_type={config.class_embed_type} of the pipeline's unet is not supported, because prompts "
                "are class numbers; give an unconditional pipeline, or one with num_class_embeds"
            )
        multiple = 2 ** (len(config.block_out_channels) - 1)
        if any(pixels % multiple for pixels in self._latent_size):
            height, width = (max(1, pixels // multiple) * multiple for pixels in self._latent_size)
            raise ConfigurationError(
                f"height={self._latent_size[0]} and width={self._latent_size[1]} must be multiples of {multiple} for "
                f"this model; write {height} and {width}"
            )

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
        return output[:, : x.shape[1]]
