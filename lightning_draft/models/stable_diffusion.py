"""Stable Diffusion 1.x and 2.x, including SD-Turbo.

References:
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_unet
from lightning_draft.models.family import Family
from lightning_draft.models.lora_names import ComfyNames
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving


def _architecture(config: Any) -> tuple[str, str]:
    is_second = config.cross_attention_dim == 1024
    return ("sd_v2", "stable-diffusion-v2-768-v") if is_second else ("sd_v1", "stable-diffusion-v1")


class StableDiffusion(PipelineModel):
    """A Stable Diffusion 1.x or 2.x pipeline; for the arguments see `PipelineModel`.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder, `None` after it was freed.
    """

    family = Family(
        pipeline="StableDiffusionPipeline",
        title="Stable Diffusion 1.x and 2.x",
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        denoiser="unet",
        text_encoders=("text_encoder",),
        guidance_scale=7.5,
        clip_skip=True,
        unused={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        single_file={"text_encoder": "cond_stage_model."},
        comfy=ComfyNames({"unet": "lora_unet_", "text_encoder": "lora_te_"}, _architecture),
    )

    def _configure(self, pipeline: Any) -> None:
        check_unet(self, addition_embed_type=(None, "text"))
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the last hidden state or, with `text.clip_skip`, an earlier one, `(tokens, width)`."""
        if self.text.clip_skip and not negative:
            return {"text": _earlier_state(self.pipeline, prompt, self.text.clip_skip)}
        text, _ = self.pipeline.encode_prompt(prompt, self._text_device, 1, False)
        return {"text": text[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.denoiser(x, time, conditioning.tensors["text"], return_dict=False)[0]
        return output


def _earlier_state(pipeline: Any, prompt: str, skip: int) -> Tensor:
    """Return the normalized hidden state before the last `skip` layers, `(tokens, width)`.

    diffusers 0.42 cannot compute it with transformers 5.6 and newer, whose `CLIPTextModel` has no `text_model`.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    text = pipeline.maybe_convert_prompt(prompt, tokenizer)
    length = tokenizer.model_max_length
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    states = encoder(tokens.to(encoder.device), output_hidden_states=True).hidden_states
    normalized: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states[-1 - skip])
    return normalized[0]
