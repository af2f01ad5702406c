"""Stable Diffusion 1.x and 2.x.

References:
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from collections.abc import Mapping

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Conditioning, Prediction
from lightning_draft.models.decoder import Memory, Precision
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.loading import Family, load_pipeline, part_dtypes
from lightning_draft.models.lora import ATTENTION, LoRA
from lightning_draft.models.pipeline import PipelineModel, tokens
from lightning_draft.schedules import VariancePreserving

FAMILY = Family(
    wrapper="StableDiffusion",
    pipeline_class=StableDiffusionPipeline,
    called="Stable Diffusion 1.x and 2.x",
    example="stable-diffusion-v1-5/stable-diffusion-v1-5",
    denoiser="unet",
    text_encoders=("text_encoder",),
    adapted=ATTENTION,
    guidance_scale=7.5,
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
        guidance: Classifier-free guidance; its scale is 7.5 by default.
        memory: Options that lower the decoder's peak memory.
        pretrained_config: For a single file: the folder or hub id of a pipeline with the same architecture; by default
            it is recognised, and its configuration comes from the hub.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder, `None` once released.
    """

    family = FAMILY
    cached_prompts = 16384

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel | None

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoRA | None = LoRA(),  # noqa: B008 (frozen)
        dtype: Precision = "float32",
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        memory: Memory = Memory(),  # noqa: B008 (frozen)
        pretrained_config: str | None = None,
    ) -> None:
        pipeline = load_pipeline(FAMILY, pretrained, part_dtypes(FAMILY, dtype, memory.vae_dtype), pretrained_config)
        _check_parts(pipeline, pretrained)
        super().__init__(
            pipeline,
            pretrained,
            lora=lora,
            guidance=guidance,
            memory=memory,
        )
        self.schedule, self.prediction = _read_schedule(pipeline)
        self.tokenizer = pipeline.tokenizer

    @property
    def _weight(self) -> Tensor:
        return self.unet.conv_in.weight

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.unet(x, time, conditioning.tensors["text"], return_dict=False)[0]
        return output

    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """The embedding `(tokens, width)`."""
        assert self.text_encoder is not None
        device = next(self.text_encoder.parameters()).device
        words = tokens(self.tokenizer, prompt, self.tokenizer.model_max_length)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = words.attention_mask.to(device) if uses_mask else None
        return {"text": self.text_encoder(words.input_ids.to(device), attention_mask=mask)[0][0]}


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
