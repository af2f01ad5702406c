"""Qwen-Image.

References:
    Wu et al., "Qwen-Image Technical Report", arXiv:2508.02324.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.guidance import with_token_norms
from lightning_draft.models.latents import Latents, decode_frame, pack, per_channel, unpack
from lightning_draft.models.lora_names import ComfyNames
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow


class QwenImage(PipelineModel):
    """A Qwen-Image pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    Guided predictions are scaled to the norms of the prediction for the prompt, token by token, as in diffusers. By
    default, only the image's stream of the attention is adapted: the output of the last block's text stream is not
    used, so that some of its layers would have no gradient.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The Qwen2.5-VL, `None` after it was freed.
    """

    family = Family(
        pipeline="QwenImagePipeline",
        title="Qwen-Image",
        example="Qwen/Qwen-Image",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=4.0,
        rescale_guidance=with_token_norms,
        latents=Latents(patch=2, packed=True, default_size=1024, unscale=per_channel, decode=decode_frame),
        text_length=512,
        max_text_length=1024,
        ragged_text=True,
        single_file={},
        comfy=ComfyNames(
            {"transformer": "diffusion_model."}, lambda config: ("qwen_image", "Qwen-Image"), underscores=False
        ),
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        tokens = self.family.latents.tokens(self._latent_size)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler, "even", tokens), "flow"

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the Qwen2.5-VL's hidden states of the prompt in the pipeline's template, `(tokens, width)`."""
        text, _ = self.pipeline.encode_prompt(prompt, self._text_device, max_sequence_length=self._text_length)
        return {"text": text[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        text = conditioning.ragged["text"]
        self._place_frequencies(x.device)
        output: Tensor = self.denoiser(
            hidden_states=pack(x),
            timestep=time.expand(len(x)) / 1000,
            encoder_hidden_states=pad_sequence(list(text), batch_first=True),
            encoder_hidden_states_mask=_mask([len(each) for each in text], x.device),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    @torch.inference_mode(False)
    def _place_frequencies(self, device: torch.device) -> None:
        """Move the frequencies of positions: autograd rejects copies that the denoiser caches in inference mode."""
        positions = self.denoiser.pos_embed
        positions.pos_freqs, positions.neg_freqs = positions.pos_freqs.to(device), positions.neg_freqs.to(device)


def _mask(lengths: list[int], device: torch.device) -> Tensor | None:
    """Return which tokens of a padded batch belong to prompts; `None` if all do."""
    if min(lengths) == max(lengths):
        return None
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
