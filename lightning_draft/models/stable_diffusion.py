"""Stable Diffusion 1.x and 2.x.

References:
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Prediction
from lightning_draft.models.loading import Family, Precision, load_pipeline, part_dtypes
from lightning_draft.models.lora import ATTENTION, LoRA
from lightning_draft.models.pipeline import GuidanceGradient, PipelineModel, check_options, tokens
from lightning_draft.schedules import VariancePreserving

FAMILY = Family(
    wrapper="StableDiffusion",
    pipeline_class=StableDiffusionPipeline,
    called="Stable Diffusion 1.x and 2.x",
    example="stable-diffusion-v1-5/stable-diffusion-v1-5",
    denoiser="unet",
    text_encoders=("text_encoder",),
    adapted=ATTENTION,
    unused={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    single_file={"safety_checker": None},
)


class StableDiffusion(PipelineModel):
    """A Stable Diffusion 1.x or 2.x pipeline, frozen, with trainable adapters on its denoiser.

    Args:
        pretrained: A shipped name (`emoji`), a diffusers pipeline folder, a `.safetensors` file in the original layout,
            or a hub id.
        lora: The adapters; `None` for none at all, and then nothing is trainable.
        dtype: What the frozen denoiser, text encoder and autoencoder are held in. Adapters and latents are float32.
        guidance_scale: `w` in `e_u + w (e_c - e_u)`, at least 0; with 1 the unconditional branch is not evaluated.
        negative_prompt: What the unconditional branch is given.
        guidance_gradient: `full` differentiates both branches, `conditional` only the one with the prompt.
        block_checkpointing: Recompute the activations inside the denoiser's blocks in the backward pass.
        decode_chunk: Decode this many images at a time; by default all at once.
        checkpoint_decoder: Recompute the decoder's activations in the backward pass, chunk by chunk.
        vae_dtype: What the autoencoder is held in, if not in `dtype`, and run in, whatever the Trainer's precision is.
        pretrained_config: For a single file: the folder or hub id of a pipeline with the same architecture; by default
            it is recognised, and its configuration comes from the hub.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder, `None` once released.
    """

    family = FAMILY
    embedded = ("text",)
    embedded_negative = ("negative",)
    cached_prompts = 16384

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel | None

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoRA | None = LoRA(),  # noqa: B008 (frozen)
        dtype: Precision = "float32",
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        guidance_gradient: GuidanceGradient = "full",
        block_checkpointing: bool = False,
        decode_chunk: int | None = None,
        checkpoint_decoder: bool = False,
        vae_dtype: Precision | None = None,
        pretrained_config: str | None = None,
    ) -> None:
        check_options(guidance_scale, guidance_gradient, decode_chunk)
        pipeline = load_pipeline(FAMILY, pretrained, part_dtypes(FAMILY, dtype, vae_dtype), pretrained_config)
        _check_parts(pipeline, pretrained)
        super().__init__(
            pipeline,
            pretrained,
            lora=lora,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            guidance_gradient=guidance_gradient,
            block_checkpointing=block_checkpointing,
            decode_chunk=decode_chunk,
            checkpoint_decoder=checkpoint_decoder,
            vae_dtype=vae_dtype,
        )
        self.schedule, self.prediction = _read_schedule(pipeline)
        self.tokenizer = pipeline.tokenizer

    @property
    def _weight(self) -> Tensor:
        return self.unet.conv_in.weight

    def _network(self, x: Tensor, time: Tensor, *texts: Tensor) -> Tensor:
        output: Tensor = self.unet(x, time, encoder_hidden_states=texts[0], return_dict=False)[0]
        return output

    def _embed(self, prompt: str) -> tuple[Tensor]:
        """The embedding `(tokens, width)`."""
        assert self.text_encoder is not None
        device = next(self.text_encoder.parameters()).device
        words = tokens(self.tokenizer, prompt, self.tokenizer.model_max_length)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = words.attention_mask.to(device) if uses_mask else None
        return (self.text_encoder(words.input_ids.to(device), attention_mask=mask)[0][0],)


def _read_schedule(pipeline: StableDiffusionPipeline) -> tuple[VariancePreserving, Prediction]:
    """The pipeline's own noise schedule and prediction type, from its scheduler's config.

    Raises:
        ConfigurationError: The scheduler does something that cannot be trained through, or is of another family.
    """
    scheduler, config = pipeline.scheduler, pipeline.scheduler.config
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ConfigurationError(
            f"the pipeline's {name} has no alphas_cumprod; put a DDIMScheduler's config in its place"
        )
    if config.get("thresholding"):
        raise ConfigurationError(
            f"the pipeline's {name} has thresholding=True, made for pixels: on latents it distorts the sample and its "
            "clamp cuts the gradient; set it to false in scheduler/scheduler_config.json"
        )
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ConfigurationError(
            f"prediction_type={prediction!r} of the pipeline's {name} is not known; it must be epsilon, v_prediction "
            "or sample"
        )
    if prediction == "epsilon" and float(table.min()) < 1e-6:  # some schedulers put 2^-24 in place of 0
        raise ConfigurationError(
            f"the pipeline's {name} has rescale_betas_zero_snr=True with prediction_type=epsilon: at zero signal the "
            "noise says nothing about the image; set rescale_betas_zero_snr to false, or use a v_prediction model"
        )
    schedule = VariancePreserving.from_table(
        table,
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
    )
    return schedule, prediction


def _check_parts(pipeline: StableDiffusionPipeline, source: str) -> None:
    """Refuse networks that need more than a latent, a time and a text.

    Raises:
        ConfigurationError: Inpainting, class-conditional or guidance-distilled networks.
    """
    unet, vae = pipeline.unet.config, pipeline.vae.config
    channels = f"its network takes {unet.in_channels} channels and the autoencoder makes {vae.latent_channels}"
    reasons = {
        f"{channels} (inpainting?)": unet.in_channels != vae.latent_channels,
        "its network needs more conditioning than text (SDXL?)": unet.addition_embed_type not in (None, "text"),
        "its network needs class labels": unet.class_embed_type is not None or unet.num_class_embeds is not None,
        "its network is distilled over guidance scales (LCM?)": unet.time_cond_proj_dim is not None,
    }
    for reason, wrong in reasons.items():
        if wrong:
            raise ConfigurationError(
                f"{source} is not a plain text-to-image Stable Diffusion 1.x or 2.x model: {reason}; "
                f"use one that is, such as {FAMILY.example}"
            )
