"""Checks that a pipeline's networks take the inputs that its family gives them."""

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.pipeline import PipelineModel


def check_channels(model: PipelineModel) -> None:
    """Check that the input of the denoiser consists of the autoencoder's latents only.

    Raises:
        ConfigurationError: Their channels differ, as in inpainting.
    """
    config, cells = model.vae.config, model.family.latents.cells
    taken, made = model.latent_shape[0], (config.get("latent_channels") or config.z_dim) * cells**2
    if taken != made:
        raise not_plain(
            model, f"its network needs {taken} channels and the autoencoder has {made} (an inpainting model?)"
        )


def check_unet(model: PipelineModel, addition_embed_type: tuple[str | None, ...]) -> None:
    """Check that a UNet needs no inputs other than its family's.

    Args:
        model: A model with the networks as attributes.
        addition_embed_type: The kinds of additional conditioning of the family.

    Raises:
        ConfigurationError: Inpainting, class-conditional or guidance-distilled networks, or those of another family.
    """
    check_channels(model)
    unet = model.denoiser.config
    if unet.addition_embed_type not in addition_embed_type:
        kind = unet.addition_embed_type
        raise not_plain(model, f"its network has additional conditioning of type {kind} (a model of another family?)")
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        raise not_plain(model, "its network needs class labels")
    if unet.time_cond_proj_dim is not None:
        raise not_plain(model, "its network is distilled over guidance scales (an LCM?)")


def not_plain(model: PipelineModel, reason: str) -> ConfigurationError:
    """Return the error for a pipeline of the family that is not for plain text-to-image generation."""
    return ConfigurationError(
        f"{model.pretrained} is not a plain text-to-image {model.family.title} model: {reason}; use another, such as "
        f"{model.family.example}"
    )
