"""Stable Diffusion 3 and 3.5.

References:
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from lightning_draft.arguments import in_range
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.decoder import Memory, Precision
from lightning_draft.models.family import Family
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.lora import ATTENTION, LoRA
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scheduler_config import rectified_flow
from lightning_draft.models.text_encoders import read_clip, tokens
from lightning_draft.models.trainable import Trainable
from lightning_draft.schedules import RectifiedFlow


class StableDiffusion3(PipelineModel):
    """A Stable Diffusion 3 or 3.5 pipeline, for the samplers `FlowEuler` and `FlowSDE`.

    With the published shift, 99.1 % of the latent is signal at the start of the last step: train several steps, since
    the last one alone hardly changes the image.

    Args:
        pretrained: A diffusers pipeline folder, or a hub id.
        lora: The adapters, by default on the attention of image and text.
        trainable: What is trained.
        dtype: Precision of the frozen networks.
        guidance: Classifier-free guidance, by default with scale 4.5.
        memory: Options that lower the decoder's peak memory.
        height: Of the images in pixels, with `width`; by default 1024 in the published pipelines.
        width: Of the images in pixels.
        t5: Load the third text encoder, the largest network; without it its tokens are zeros, as in training.
        max_sequence_length: Tokens that the third text encoder reads, 1 to 512.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The first CLIP, `None` once released.
        text_encoder_2: The second CLIP, likewise.
        text_encoder_3: The T5, likewise, or `None` without it.
    """

    family = Family(
        pipeline_class=StableDiffusion3Pipeline,
        title="Stable Diffusion 3 and 3.5",
        example="stabilityai/stable-diffusion-3.5-medium",
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        guidance_scale=4.5,
        lora_targets=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        also_opens=("StableDiffusion3Img2ImgPipeline",),
        unused={"image_encoder": None, "feature_extractor": None},
        single_file_layouts=("sd3",),
    )

    schedule: RectifiedFlow
    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModelWithProjection | None
    text_encoder_2: CLIPTextModelWithProjection | None
    text_encoder_3: T5EncoderModel | None

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoRA | None = LoRA(),  # noqa: B008 (frozen)
        trainable: Trainable = "lora",
        dtype: Precision = "float32",
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        memory: Memory = Memory(),  # noqa: B008 (frozen)
        height: int | None = None,
        width: int | None = None,
        t5: bool = True,
        max_sequence_length: int = 256,
    ) -> None:
        in_range("max_sequence_length", max_sequence_length, 1, 512, "write 256")
        super().__init__(
            pretrained,
            lora=lora,
            trainable=trainable,
            dtype=dtype,
            guidance=guidance,
            memory=memory,
            height=height,
            width=width,
            omit=() if t5 else ("text_encoder_3", "tokenizer_3"),
        )
        self.max_sequence_length = max_sequence_length

    def _configure(self, pipeline: Any) -> None:
        taken, made = self.transformer.config.in_channels, self.vae.config.latent_channels
        if taken != made:
            raise ConfigurationError(
                f"{self.pretrained} is not a plain text-to-image Stable Diffusion 3 model: its network takes {taken} "
                f"channels and the autoencoder makes {made}; use one that is, such as {self.family.example}"
            )
        self.schedule, self.prediction = rectified_flow(pipeline.scheduler), "flow"
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)

    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Return tokens `(CLIP's + T5's, width)` and pooled embedding `(width,)`, joined as in the paper's fig. 2."""
        clips = (self.text_encoder, self.text_encoder_2)
        length = self.tokenizers[0].model_max_length
        pairs = [
            read_clip(encoder, tokens(tokenizer, prompt, length, warn=self.text_encoder_3 is None and index == 0))
            for index, (encoder, tokenizer) in enumerate(zip(clips, self.tokenizers, strict=False))
        ]
        words, pooled = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
        width = self.transformer.config.joint_attention_dim
        text = torch.cat([pad(words, (0, width - words.shape[-1])), self._read_t5(prompt, words)])
        return {"text": text, "pooled": pooled}

    def _read_t5(self, prompt: str, like: Tensor) -> Tensor:
        """Return the T5's tokens `(max_sequence_length, width)`, zeros without a T5."""
        width = self.transformer.config.joint_attention_dim
        if self.text_encoder_3 is None:
            return like.new_zeros(self.max_sequence_length, width)
        ids = tokens(self.tokenizers[2], prompt, self.max_sequence_length).input_ids
        states: Tensor = self.text_encoder_3(ids.to(like.device))[0][0]
        return states.to(like)

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states=x,
            timestep=time.expand(len(x)),
            encoder_hidden_states=conditioning.tensors["text"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return output
