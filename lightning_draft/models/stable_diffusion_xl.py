"""Stable Diffusion XL, including SDXL-Turbo.

References:
    Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv:2307.01952.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_unet
from lightning_draft.models.family import Family
from lightning_draft.models.lora_names import ComfyNames, original_unet_name
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving


class StableDiffusionXL(PipelineModel):
    """A Stable Diffusion XL pipeline; for the arguments see `PipelineModel`.

    The size conditioning of the network is the sampled size, without a crop. An autoencoder with `force_upcast` in its
    config runs in float32, unless `memory.vae_dtype` is given. An empty negative prompt is embedded as zeros if the
    pipeline's config requires it, as in diffusers.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The first CLIP, `None` after it was freed.
        text_encoder_2: The second CLIP, `None` after it was freed.
    """

    family = Family(
        pipeline="StableDiffusionXLPipeline",
        title="Stable Diffusion XL",
        example="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser="unet",
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=5.0,
        clip_skip=True,
        unused={"image_encoder": None, "feature_extractor": None},
        single_file={"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
        upcast_vae=True,
        comfy=ComfyNames(
            {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
            lambda config: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
            original_unet_name,
        ),
    )

    def _configure(self, pipeline: Any) -> None:
        check_unet(self, addition_embed_type=("text_time",))
        if self.text_encoder is None:
            raise ConfigurationError(
                f"{self.pretrained} has no first text encoder (the SDXL refiner?); use a base model such as "
                f"{self.family.example}"
            )
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the hidden states of both CLIPs, `(tokens, width)`, and the pooled embedding of the second."""
        skip = None if negative else self.text.clip_skip or None
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self._text_device, do_classifier_free_guidance=False, clip_skip=skip
        )
        if negative and not prompt and self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        return {"text": text[0], "pooled": pooled[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = self.image_size
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype, device=x.device)
        added = {"text_embeds": conditioning.tensors["pooled"], "time_ids": size.expand(len(x), -1)}
        text = conditioning.tensors["text"]
        output: Tensor = self.denoiser(x, time, text, added_cond_kwargs=added, return_dict=False)[0]
        return output
