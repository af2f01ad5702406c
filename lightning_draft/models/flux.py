"""FLUX.1 dev and schnell.

References:
    Black Forest Labs, https://github.com/black-forest-labs/flux.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.latents import Latents, pack, positions, unpack
from lightning_draft.models.lora import JOINT_ATTENTION
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow


class Flux(PipelineModel):
    """A FLUX.1 dev or schnell pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    The dev model has its guidance scale as an input (`guidance.embedded`) and is called once per step. With
    `guidance.scale` other than 1, classifier-free guidance is applied in addition, like diffusers' `true_cfg_scale`.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The CLIP, `None` after it was freed.
        text_encoder_2: The T5, `None` after it was freed.
    """

    family = Family(
        pipeline="FluxPipeline",
        title="FLUX.1",
        example="black-forest-labs/FLUX.1-schnell",
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=1.0,
        embedded_guidance=3.5,
        latents=Latents(patch=2, packed=True, default_size=1024),
        text_length=512,
        max_text_length=512,
        lora_targets=JOINT_ATTENTION,
        unused={"image_encoder": None, "feature_extractor": None},
        single_file={
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.t5xxl.transformer.",
        },
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        tokens = self.family.latents.tokens(self._latent_size)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler, "even", tokens), "flow"

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the T5's hidden states, `(tokens, width)`, and the CLIP's pooled embedding."""
        text, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self._text_device, max_sequence_length=self._text_length
        )
        return {"text": text[0], "pooled": pooled[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        text = conditioning.tensors["text"]
        scale = self.guidance.embedded if self.denoiser.config.guidance_embeds else None
        output: Tensor = self.denoiser(
            hidden_states=pack(x),
            timestep=time.expand(len(x)) / 1000,
            guidance=None if scale is None else torch.full_like(time, scale).expand(len(x)),
            pooled_projections=conditioning.tensors["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=positions(height // 2, width // 2, x.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)
