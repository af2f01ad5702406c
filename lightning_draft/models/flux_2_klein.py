"""FLUX.2 Klein.

References:
    Black Forest Labs, https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.latents import Latents, positions
from lightning_draft.models.lora import JOINT_ATTENTION
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import empirical_flow
from lightning_draft.models.text_encoding import as_chat


def _unscale(vae: Any, latents: Tensor) -> Tensor:
    """Undo the batch normalization of the autoencoder's latents, and then their packing in 2x2 patches."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return F.pixel_shuffle(latents * std[:, None, None] + vae.bn.running_mean[:, None, None], 2)


class Flux2Klein(PipelineModel):
    """A FLUX.2 Klein pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    The default of `guidance.scale` is 4, and 1 for models distilled to a few steps (`is_distilled` in the pipeline's
    config). Reference images are not supported.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The language model, `None` after it was freed.
    """

    family = Family(
        pipeline="Flux2KleinPipeline",
        title="FLUX.2 Klein",
        example="black-forest-labs/FLUX.2-klein-4B",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=4.0,
        latents=Latents(default_size=1024, cells=2, unscale=_unscale),
        text_length=512,
        max_text_length=512,
        lora_targets=(*JOINT_ATTENTION, "to_qkv_mlp_proj"),
        single_file={},
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        tokens = self.family.latents.tokens(self._latent_size)
        self.schedule, self.prediction = empirical_flow(pipeline.scheduler, tokens), "flow"

    @property
    def _published_scale(self) -> float:
        return 1.0 if self.pipeline.config.is_distilled else super()._published_scale

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the hidden states of three layers of the language model, `(tokens, 3 width)`."""
        text, _ = self.pipeline.encode_prompt(prompt, self._text_device, max_sequence_length=self._text_length)
        return {"text": text[0]}

    def _text_of(self, prompt: str) -> str:
        return as_chat(self.pipeline.tokenizer, prompt, thinking=False)

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        text, (height, width) = conditioning.tensors["text"], x.shape[-2:]
        output: Tensor = self.denoiser(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time.expand(len(x)) / 1000,
            encoder_hidden_states=text,
            txt_ids=F.pad(torch.arange(text.shape[1], device=x.device)[:, None], (3, 0)),
            img_ids=F.pad(positions(height, width, x.device), (0, 1)),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(len(x), -1, height, width)
