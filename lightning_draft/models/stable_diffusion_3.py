"""Stable Diffusion 3 and 3.5.

References:
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.models.checks import check_channels
from lightning_draft.models.family import Family
from lightning_draft.models.lora import JOINT_ATTENTION
from lightning_draft.models.lora_names import ComfyNames
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow


class StableDiffusion3(PipelineModel):
    """A Stable Diffusion 3 or 3.5 pipeline, for `FlowEuler` and `FlowSDE`; for the arguments see `PipelineModel`.

    `omit: [text_encoder_3]` omits the T5, the largest network; its tokens are then zeros, as in training.

    With the published shift, 99.1 % of the latent is signal at the start of the last step. Train several steps, because
    the last one alone hardly changes the image.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The first CLIP, `None` after it was freed.
        text_encoder_2: The second CLIP, `None` after it was freed.
        text_encoder_3: The T5, `None` if it is omitted or after it was freed.
    """

    family = Family(
        pipeline="StableDiffusion3Pipeline",
        title="Stable Diffusion 3 and 3.5",
        example="stabilityai/stable-diffusion-3.5-medium",
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        guidance_scale=4.5,
        text_length=256,
        max_text_length=512,
        clip_skip=True,
        lora_targets=JOINT_ATTENTION,
        optional=("text_encoder_3",),
        unused={"image_encoder": None, "feature_extractor": None},
        single_file={
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer.",
        },
        comfy=ComfyNames(
            {name: f"{name}." for name in ("transformer", "text_encoder", "text_encoder_2")},
            lambda config: ("sd3", "stable-diffusion-3-medium"),
            underscores=False,
        ),
    )

    def _configure(self, pipeline: Any) -> None:
        check_channels(self)
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler), "flow"

    def _embed(self, prompt: str, negative: bool = False) -> Mapping[str, Tensor]:
        """Return tokens `(CLIP's + T5's, width)` and pooled embedding `(width,)`, joined as in the paper's fig. 2."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            None,
            None,
            self._text_device,
            do_classifier_free_guidance=False,
            clip_skip=None if negative else self.text.clip_skip or None,
            max_sequence_length=self._text_length,
        )
        return {"text": text[0], "pooled": pooled[0]}

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x,
            timestep=time.expand(len(x)),
            encoder_hidden_states=conditioning.tensors["text"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return output
