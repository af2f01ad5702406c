"""Stable Diffusion XL, SDXL-Turbo and Lightning-type checkpoints included.

References:
    Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv:2307.01952.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.decoder import Precision
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving
from lightning_draft.models.stable_diffusion import check_unet
from lightning_draft.models.text_encoders import read_clip, tokens


class StableDiffusionXL(PipelineModel):
    """A Stable Diffusion XL pipeline; arguments as of `PipelineModel`.

    The network is told that images have the size that is sampled and are not cropped. An autoencoder whose config says
    `force_upcast` runs in float32 unless `memory.vae_dtype` says otherwise. An empty negative prompt is embedded as
    zeros where the pipeline's config says so, as in diffusers.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The first CLIP, `None` once released.
        text_encoder_2: The second CLIP, likewise.
    """

    family = Family(
        pipeline_class=StableDiffusionXLPipeline,
        title="Stable Diffusion XL",
        example="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser="unet",
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=5.0,
        also_opens=("StableDiffusionXLImg2ImgPipeline",),
        unused={"image_encoder": None, "feature_extractor": None},
        single_file={},
        single_file_layouts=("xl_base", "playground"),
    )

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel | None
    text_encoder_2: CLIPTextModelWithProjection | None

    def _configure(self, pipeline: Any) -> None:
        check_unet(self, addition_embed_type=("text_time",))
        if self.text_encoder is None:
            raise ConfigurationError(
                f"{self.pretrained} has no first text encoder, as the SDXL refiner; use a base model such as "
                f"{self.family.example}"
            )
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self._zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))
        if self.memory.vae_dtype is None:
            if self.vae.config.get("force_upcast"):
                self.memory = replace(self.memory, vae_dtype="float32")
            else:
                self.vae.to(self._dtypes["text_encoder"])

    def _precisions(self, dtype: Precision) -> dict[str, torch.dtype]:
        """Load the autoencoder in float32 unless told otherwise, as its config may ask for it."""
        dtypes = super()._precisions(dtype)
        return dtypes if self.memory.vae_dtype is not None else {**dtypes, "vae": torch.float32}

    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Return both CLIPs' hidden states, `(tokens, width)`, and the second one's pooled embedding."""
        encoders = (self.text_encoder, self.text_encoder_2)
        states, pooled = zip(
            *(
                read_clip(encoder, tokens(tokenizer, prompt, tokenizer.model_max_length, warn=encoder is encoders[0]))
                for encoder, tokenizer in zip(encoders, self.tokenizers, strict=True)
            ),
            strict=True,
        )
        return {"text": torch.cat(states, -1), "pooled": pooled[1]}

    def _embed_negative(self, prompt: str) -> Mapping[str, Tensor]:
        embedding = self._embed(prompt)
        if prompt or not self._zeros_for_empty:
            return embedding
        return {name: torch.zeros_like(tensor) for name, tensor in embedding.items()}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = self.image_size
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype, device=x.device)
        added = {"text_embeds": conditioning.tensors["pooled"], "time_ids": size.expand(len(x), -1)}
        text = conditioning.tensors["text"]
        output: Tensor = self.unet(x, time, text, added_cond_kwargs=added, return_dict=False)[0]
        return output
