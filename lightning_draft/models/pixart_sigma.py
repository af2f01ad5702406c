"""PixArt-Sigma.

References:
    Chen et al., "PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation",
    arXiv:2403.04692.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import variance_preserving


class PixArtSigma(PipelineModel):
    """A PixArt-Sigma pipeline; arguments as of `PipelineModel`.

    The half of the network's output that predicts the variance is not used. Images have the given size, and prompts are
    read as they are (`use_resolution_binning=False` and `clean_caption=False` in diffusers). diffusers has no
    `load_lora_weights` for this pipeline: peft loads the exported file.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The T5, `None` after it was freed.
    """

    family = Family(
        pipeline="PixArtSigmaPipeline",
        title="PixArt-Sigma",
        example="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=4.5,
        text_length=300,
        max_text_length=300,
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        self.schedule, self.prediction = variance_preserving(pipeline.scheduler)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the T5's hidden states, `(tokens, width)`, and their attention mask."""
        text, mask, _, _ = self.pipeline.encode_prompt(
            prompt, False, device=self._text_device, max_sequence_length=self._text_length
        )
        return {"text": text[0], "mask": mask[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.denoiser(
            x,
            encoder_hidden_states=conditioning.tensors["text"],
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=time.expand(len(x)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]
