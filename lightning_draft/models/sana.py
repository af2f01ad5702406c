"""Sana.

References:
    Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers", arXiv:2410.10629.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow


def default_instruction(pipeline: Any) -> Any:
    """Return the text, a list of lines, that a pipeline of Sana puts before each prompt."""
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


class Sana(PipelineModel):
    """A Sana pipeline, for `FlowEuler` and `FlowSDE`; arguments as of `PipelineModel`.

    The pipeline's default instruction is put before each prompt, but not before the negative prompt. Images have the
    given size (`use_resolution_binning=False` in diffusers).

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder, whose latent cells are 32x32 pixels each.
        text_encoder: The language model, `None` after it was freed.
    """

    family = Family(
        pipeline="SanaPipeline",
        title="Sana",
        example="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=4.5,
        text_length=300,
        max_text_length=300,
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler), "flow"
        self._instruction = default_instruction(pipeline)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the language model's hidden states, `(tokens, width)`, and their attention mask."""
        text, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            False,
            device=self._text_device,
            max_sequence_length=self._text_length,
            complex_human_instruction=None if negative else self._instruction,
        )
        return {"text": text[0], "mask": mask[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.denoiser(
            x,
            encoder_hidden_states=conditioning.tensors["text"],
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=time.expand(len(x)) * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return output
