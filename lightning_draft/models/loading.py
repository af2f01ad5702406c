"""Find and open Stable Diffusion pipelines: shipped names, folders, single files, hub ids."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Prediction
from lightning_draft.schedules import VariancePreserving

Precision = Literal["float32", "bfloat16", "float16"]

_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_UNUSED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_SHIPPED = "emoji"
_EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigurationError: It is not one that a frozen network can be held in.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigurationError(f"dtype={name!r} is not supported; write float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_pipeline(
    pretrained: str, dtypes: Mapping[str, torch.dtype], config: str | None = None
) -> StableDiffusionPipeline:
    """Open a text-to-image Stable Diffusion 1.x or 2.x pipeline, without its safety checker.

    Safetensors are preferred; pickles are read with `weights_only`; code from a repository is never run.

    Args:
        pretrained: A shipped name, a folder, a `.safetensors` file in the original layout, or a hub id.
        dtypes: Of each part's weights: `unet`, `vae` and `text_encoder`.
        config: For a single file: the folder or hub id of a pipeline with the same architecture.

    Raises:
        ConfigurationError: It cannot be found, or is something else.
    """
    path = _shipped(pretrained) or Path(pretrained).expanduser()
    with _quiet():
        if path.is_file():
            return _single_file(path, dtypes, config)
        if path.is_dir():
            return _folder(path, dtypes)
        if _is_path(pretrained):
            raise ConfigurationError(
                f"{pretrained} does not exist; give a pipeline folder, a .safetensors file, a hub id such as "
                f"{_EXAMPLE}, or the shipped name {_SHIPPED}"
            )
        return _hub(pretrained, dtypes)


def read_schedule(pipeline: StableDiffusionPipeline) -> tuple[VariancePreserving, Prediction]:
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


def check_parts(pipeline: StableDiffusionPipeline, source: str) -> None:
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
                f"use one that is, such as {_EXAMPLE}"
            )


def _shipped(name: str) -> Path | None:
    if name != _SHIPPED:
        return None
    from lightning_draft.assets import resolve

    return Path(resolve(name))


def _folder(folder: Path, dtypes: Mapping[str, torch.dtype]) -> StableDiffusionPipeline:
    if not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json; give the folder that "
            "StableDiffusionPipeline.save_pretrained wrote, not one of its parts"
        )
    _check_class(StableDiffusionPipeline.load_config(str(folder)), str(folder))
    return _from_pretrained(str(folder), dtypes, _variant(folder / "unet"))


def _hub(name: str, dtypes: Mapping[str, torch.dtype]) -> StableDiffusionPipeline:
    try:
        _check_class(StableDiffusionPipeline.load_config(name), name)
        try:
            return _from_pretrained(name, dtypes, None)
        except OSError:
            return _from_pretrained(name, dtypes, "fp16")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{name!r} is neither a folder here nor the shipped {_SHIPPED}, and could not be had "
            f"from the hub ({reason}); check the spelling and the connection, log in with `hf auth login` if it is "
            "private, or give a local folder"
        ) from error


def _single_file(file: Path, dtypes: Mapping[str, torch.dtype], config: str | None) -> StableDiffusionPipeline:
    if file.suffix != ".safetensors":
        raise ConfigurationError(f"{file} is not a .safetensors file; convert it, or give a diffusers pipeline folder")
    arguments = {} if config is None else {"config": config}
    common = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
    try:
        pipeline = StableDiffusionPipeline.from_single_file(str(file), dtype=common, safety_checker=None, **arguments)
    except (OSError, ValueError, SingleFileComponentError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"{file} could not be opened as a Stable Diffusion checkpoint ({reason}); without a connection, name the "
            "folder of a pipeline with the same architecture as pretrained_config"
        ) from error
    for name, dtype in dtypes.items():
        nn.Module.to(getattr(pipeline, name), dtype)
    return pipeline


def _from_pretrained(source: str, dtypes: Mapping[str, torch.dtype], variant: str | None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(source, dtype=dict(dtypes), variant=variant, **_UNUSED)


def _variant(unet: Path) -> str | None:
    """`fp16`, or whatever the files are called, where the folder has only weights with such an infix."""
    names = [file.name for file in sorted(unet.glob("diffusion_pytorch_model*")) if not file.name.endswith(".json")]
    infixes = [name.split(".")[1].split("-")[0] if name.count(".") > 1 else None for name in names]
    return None if None in infixes else next(iter(infixes), None)


def _check_class(index: dict[str, Any], source: str) -> None:
    name = index.get("_class_name")
    if name not in _CLASSES:
        raise ConfigurationError(
            f"{source} is a {name}, and StableDiffusion opens Stable Diffusion 1.x and 2.x pipelines "
            f"({_CLASSES[0]}); use such a pipeline, for example {_EXAMPLE}"
        )


def _is_path(name: str) -> bool:
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".ckpt"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars off the terminal while small files are read."""
    modules = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in modules:
            module.enable_progress_bar()
