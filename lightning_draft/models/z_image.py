"""Z-Image and Z-Image-Turbo.

References:
    Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer",
    arXiv:2511.22699.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.latents import Latents
from lightning_draft.models.lora_names import ComfyNames
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow
from lightning_draft.models.text_encoding import as_chat


class ZImage(PipelineModel):
    """A Z-Image or Z-Image-Turbo pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    `guidance.scale` is `guidance_scale + 1` of diffusers' pipeline, whose 0 is 1 here: no guidance, as the Turbo model
    needs it. `guidance.max_norm` is its `cfg_normalization`.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The Qwen3, `None` after it was freed.
    """

    family = Family(
        pipeline="ZImagePipeline",
        title="Z-Image",
        example="Tongyi-MAI/Z-Image-Turbo",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=5.0,
        latents=Latents(patch=2, default_size=1024),
        text_length=512,
        max_text_length=512,
        ragged_text=True,
        single_file={},
        comfy=ComfyNames({"transformer": "diffusion_model."}, lambda config: ("z_image", "Z-Image"), underscores=False),
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        tokens = self.family.latents.tokens(self._latent_size)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler, "even", tokens), "flow"

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the Qwen3's hidden states of the chat with this prompt, `(tokens of this chat, width)`."""
        texts, _ = self.pipeline.encode_prompt(
            prompt, self._text_device, do_classifier_free_guidance=False, max_sequence_length=self._text_length
        )
        return {"text": texts[0]}

    def _text_of(self, prompt: str) -> str:
        return as_chat(self.pipeline.tokenizer, prompt, thinking=True)

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        outputs: list[Tensor] = self.denoiser(
            list(x.unsqueeze(2)),  # of one frame each
            (1000 - time.expand(len(x))) / 1000,
            list(conditioning.ragged["text"]),
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)
