"""Sana-Sprint.

References:
    Chen et al., "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", arXiv:2503.09641.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.sana import default_instruction
from lightning_draft.models.scheduler_config import trigonometric_flow
from lightning_draft.stochastic_flow import FlowCPS


class SanaSprint(PipelineModel):
    """A Sana-Sprint pipeline, for `FlowCPS` with 1 to 4 steps; arguments as of `PipelineModel`.

    `FlowCPS(noise_level=1)` is multistep consistency sampling, `x_s = (1 - s) x_0 + s z`, as in diffusers' pipeline; it
    is deterministic with one step. The guidance scale is an input of the network (`guidance.embedded`). The pipeline's
    default instruction is put before each prompt. Images have the given size (`use_resolution_binning=False`).

    The latents are those of a rectified flow: `(1 - t) x_0 + t eps` is the pipeline's
    `sigma_data (cos(a) x_0 + sin(a) eps)` up to a factor, see `TrigonometricFlow`.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder, whose latent cells are 32x32 pixels each.
        text_encoder: The language model, `None` after it was freed.
    """

    family = Family(
        pipeline="SanaSprintPipeline",
        title="Sana-Sprint",
        example="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        denoiser="transformer",
        text_encoders=("text_encoder",),
        guidance_scale=1.0,
        embedded_guidance=4.5,
        text_length=300,
        max_text_length=300,
        sampler=partial(FlowCPS, noise_level=1.0),
        steps=2,
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        self.schedule, self.prediction = trigonometric_flow(pipeline.scheduler), "flow"
        self._instruction = default_instruction(pipeline)

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return the language model's hidden states, `(tokens, width)`, and their attention mask."""
        text, mask = self.pipeline.encode_prompt(
            prompt,
            device=self._text_device,
            max_sequence_length=self._text_length,
            complex_human_instruction=None if negative else self._instruction,
        )
        return {"text": text[0], "mask": mask[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        assert self.guidance.embedded is not None
        scale = x.new_full((len(x),), self.guidance.embedded) * self.denoiser.config.guidance_embeds_scale
        output: Tensor = self.denoiser(
            x,
            encoder_hidden_states=conditioning.tensors["text"],
            encoder_attention_mask=conditioning.tensors["mask"],
            guidance=scale,
            timestep=time.expand(len(x)) / self.schedule.num_train_timesteps,
            return_dict=False,
        )[0]
        return output
