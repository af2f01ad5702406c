"""Stable Diffusion 1.x and 2.x, SD-Turbo included.

References:
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving
from lightning_draft.models.text_encoders import tokens


class StableDiffusion(PipelineModel):
    """A Stable Diffusion 1.x or 2.x pipeline; arguments as of `PipelineModel`.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder, `None` once released.
    """

    family = Family(
        pipeline_class=StableDiffusionPipeline,
        title="Stable Diffusion 1.x and 2.x",
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        denoiser="unet",
        text_encoders=("text_encoder",),
        guidance_scale=7.5,
        also_opens=("StableDiffusionImg2ImgPipeline",),
        unused={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        single_file={"safety_checker": None},
        single_file_layouts=("v1", "v2"),
    )

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel | None

    def _configure(self, pipeline: Any) -> None:
        check_unet(self, addition_embed_type=(None, "text"))
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)
        self.tokenizer = pipeline.tokenizer

    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Return the last hidden state, `(tokens, width)`."""
        assert self.text_encoder is not None
        device = next(self.text_encoder.parameters()).device
        words = tokens(self.tokenizer, prompt, self.tokenizer.model_max_length)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = words.attention_mask.to(device) if uses_mask else None
        return {"text": self.text_encoder(words.input_ids.to(device), attention_mask=mask)[0][0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.unet(x, time, conditioning.tensors["text"], return_dict=False)[0]
        return output


def check_unet(model: PipelineModel, addition_embed_type: tuple[str | None, ...]) -> None:
    """Refuse a UNet that needs other inputs than its family gives it.

    Raises:
        ConfigurationError: Inpainting, class-conditional or guidance-distilled networks, or those of another family.
    """
    unet, made = model.denoiser.config, model.vae.config.latent_channels
    channels = f"its network takes {unet.in_channels} channels and the autoencoder makes {made} (inpainting?)"
    reasons = {
        channels: unet.in_channels != made,
        f"its network has additional conditioning of type {unet.addition_embed_type} (another family?)": (
            unet.addition_embed_type not in addition_embed_type
        ),
        "its network needs class labels": unet.class_embed_type is not None or unet.num_class_embeds is not None,
        "its network is distilled over guidance scales (LCM?)": unet.time_cond_proj_dim is not None,
    }
    for reason, wrong in reasons.items():
        if wrong:
            raise ConfigurationError(
                f"{model.pretrained} is not a plain text-to-image {model.family.title} model: {reason}; use one that "
                f"is, such as {model.family.example}"
            )
