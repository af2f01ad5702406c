"""Chroma.

References:
    Lodestone Rock, https://huggingface.co/lodestones/Chroma.
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


class Chroma(PipelineModel):
    """A Chroma pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The T5, `None` after it was freed.
    """

    family = Family(
        pipeline="ChromaPipeline",
        title="Chroma",
        example="lodestones/Chroma1-HD",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=5.0,
        latents=Latents(patch=2, packed=True, default_size=1024),
        text_length=512,
        max_text_length=512,
        lora_targets=JOINT_ATTENTION,
        unused={"image_encoder": None, "feature_extractor": None},
        single_file={"text_encoder": "text_encoders.t5xxl.transformer."},
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        tokens = self.family.latents.tokens(self._latent_size)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler, "even", tokens), "flow"

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the T5's hidden states, `(tokens, width)`, and their mask: the prompt's tokens and one more."""
        text, _, mask, *_ = self.pipeline.encode_prompt(
            prompt, device=self._text_device, do_classifier_free_guidance=False, max_sequence_length=self._text_length
        )
        return {"text": text[0], "mask": mask[0].bool()}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        text, image = conditioning.tensors["text"], pack(x)
        mask = torch.cat([conditioning.tensors["mask"], text.new_ones(image.shape[:2], dtype=torch.bool)], 1)
        output: Tensor = self.denoiser(
            hidden_states=image,
            timestep=time.expand(len(x)) / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=positions(height // 2, width // 2, x.device),
            attention_mask=mask.to(x.dtype),
            return_dict=False,
        )[0]
        return unpack(output, height, width)
