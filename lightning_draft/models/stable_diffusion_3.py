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

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning
from lightning_draft.models.decoder import Memory, Precision
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.loading import Family, load_pipeline, part_dtypes
from lightning_draft.models.lora import ATTENTION, LoRA
from lightning_draft.models.pipeline import PipelineModel, tokens
from lightning_draft.schedules import RectifiedFlow

FAMILY = Family(
    wrapper="StableDiffusion3",
    pipeline_class=StableDiffusion3Pipeline,
    called="Stable Diffusion 3 and 3.5",
    example="stabilityai/stable-diffusion-3.5-medium",
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    adapted=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    guidance_scale=4.5,
    unused={"image_encoder": None, "feature_extractor": None},
)
_OTHER_GRIDS = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
)


class StableDiffusion3(PipelineModel):
    """A Stable Diffusion 3 or 3.5 pipeline, frozen, with trainable adapters on its denoiser.

    Its samplers are `FlowEuler` and `FlowSDE`. With the published shift the last of their steps starts where all but
    0.9 % is signal: train several steps, since the last one alone can change next to nothing.

    Args:
        pretrained: A diffusers pipeline folder, or a hub id.
        lora: The adapters, by default on the attention of image and text alike; `None` for none at all, and then
            nothing is trainable.
        dtype: What the frozen denoiser, text encoders and autoencoder are held in. Adapters and latents are float32.
        guidance: Classifier-free guidance; its scale is 4.5 by default.
        t5: Load the third text encoder, the largest part of the pipeline; without it zeros stand in its tokens' place,
            as the models were trained for.
        max_sequence_length: Tokens that the third text encoder reads, 1 to 512.
        resolution: Height and width of the images in pixels; by default the pipeline's own, 1024 of the published ones.
        memory: Options that lower the decoder's peak memory.

    Attributes:
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The first CLIP, `None` once released.
        text_encoder_2: The second CLIP, likewise.
        text_encoder_3: The T5, likewise, or `None` where there is none.
    """

    family = FAMILY
    cached_prompts = 1024

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
        dtype: Precision = "float32",
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        t5: bool = True,
        max_sequence_length: int = 256,
        resolution: int | None = None,
        memory: Memory = Memory(),  # noqa: B008 (frozen)
    ) -> None:
        if not 1 <= max_sequence_length <= 512:
            raise ConfigurationError(f"max_sequence_length={max_sequence_length} must lie in 1..512; write 256")
        left_out: dict[str, None] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = load_pipeline(FAMILY, pretrained, part_dtypes(FAMILY, dtype, memory.vae_dtype), **left_out)
        _check_parts(pipeline, pretrained)
        super().__init__(
            pipeline,
            pretrained,
            lora=lora,
            guidance=guidance,
            memory=memory,
        )
        self.schedule, self.prediction = _read_schedule(pipeline), "flow"
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
        self.max_sequence_length = max_sequence_length
        self._size = None if resolution is None else _latent_size(pipeline, resolution)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = super().latent_shape
        return (channels, height, width) if self._size is None else (channels, self._size, self._size)

    @property
    def _weight(self) -> Tensor:
        return self.transformer.pos_embed.proj.weight

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states=x,
            timestep=time.expand(len(x)),
            encoder_hidden_states=conditioning.tensors["text"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return output

    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Tokens `(CLIP's + T5's, width)` and the pooled embedding `(width,)`, as the pipeline joins them (fig. 2)."""
        clips = (self.text_encoder, self.text_encoder_2)
        length = self.tokenizers[0].model_max_length
        pairs = [
            _read_clip(encoder, tokens(tokenizer, prompt, length, warn=self.text_encoder_3 is None and index == 0))
            for index, (encoder, tokenizer) in enumerate(zip(clips, self.tokenizers, strict=False))
        ]
        words, pooled = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
        width = self.transformer.config.joint_attention_dim
        text = torch.cat([pad(words, (0, width - words.shape[-1])), self._read_t5(prompt, words)])
        return {"text": text, "pooled": pooled}

    def _read_t5(self, prompt: str, like: Tensor) -> Tensor:
        """The T5's tokens `(max_sequence_length, width)`, zeros where there is no T5."""
        width = self.transformer.config.joint_attention_dim
        if self.text_encoder_3 is None:
            return like.new_zeros(self.max_sequence_length, width)
        ids = tokens(self.tokenizers[2], prompt, self.max_sequence_length).input_ids
        return self.text_encoder_3(ids.to(like.device))[0][0].to(like)


def _read_clip(encoder: Any, words: Any) -> tuple[Tensor, Tensor]:
    """The last layer but one, `(tokens, width)`, and the projected embedding, `(width,)`."""
    output = encoder(words.input_ids.to(next(encoder.parameters()).device), output_hidden_states=True)
    return output.hidden_states[-2][0], output[0][0]


def _read_schedule(pipeline: StableDiffusion3Pipeline) -> RectifiedFlow:
    """The pipeline's own schedule, from its scheduler's config.

    Raises:
        ConfigurationError: The scheduler is of another family, or has a grid that is more than a shift.
    """
    config, name = pipeline.scheduler.config, type(pipeline.scheduler).__name__
    if not name.startswith("FlowMatch"):
        raise ConfigurationError(
            f"the pipeline's {name} is not made for rectified flows; put a FlowMatchEulerDiscreteScheduler's config in "
            "its place"
        )
    others = [key for key in _OTHER_GRIDS if config.get(key)]
    if others:
        raise ConfigurationError(
            f"the pipeline's {name} has {others[0]}={config[others[0]]}, and the samplers here know a constant shift "
            f"alone; take {others[0]} out of scheduler/scheduler_config.json and write shift, 3.0 in the published ones"
        )
    return RectifiedFlow(config.get("shift", 1.0), config.get("num_train_timesteps", 1000))


def _check_parts(pipeline: StableDiffusion3Pipeline, source: str) -> None:
    """Refuse networks that take more than a latent.

    Raises:
        ConfigurationError: The denoiser's channels are not the autoencoder's.
    """
    taken, made = pipeline.transformer.config.in_channels, pipeline.vae.config.latent_channels
    if taken != made:
        raise ConfigurationError(
            f"{source} is not a plain text-to-image Stable Diffusion 3 model: its network takes {taken} channels and "
            f"the autoencoder makes {made}; use one that is, such as {FAMILY.example}"
        )


def _latent_size(pipeline: StableDiffusion3Pipeline, resolution: int) -> int:
    """Height and width of the latents of images of a resolution.

    Raises:
        ConfigurationError: The denoiser's patches or positions do not fit it.
    """
    config = pipeline.transformer.config
    grain = pipeline.vae_scale_factor * config.patch_size
    largest = grain * config.pos_embed_max_size
    if resolution < grain or resolution % grain or resolution > largest:
        raise ConfigurationError(
            f"resolution={resolution} must be a multiple of {grain} up to {largest} for this model; write 512 or 1024"
        )
    return resolution // pipeline.vae_scale_factor
