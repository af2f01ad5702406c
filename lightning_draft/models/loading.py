"""Find and open diffusers' pipelines: shipped names, folders, single files, hub ids."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.decoder import Precision

WRAPPERS = {
    "StableDiffusionPipeline": "StableDiffusion",
    "StableDiffusionImg2ImgPipeline": "StableDiffusion",
    "StableDiffusion3Pipeline": "StableDiffusion3",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3",
}
"""Which class of `lightning_draft.models` opens the pipelines of which class of diffusers'."""

_SHIPPED = "emoji"


@dataclass(frozen=True)
class Family:
    """What sets the pipelines of one wrapper apart.

    Args:
        wrapper: Name of the class in `lightning_draft.models`.
        pipeline_class: Class of diffusers' that opens them.
        called: What they are called.
        example: Hub id of one.
        denoiser: Name of the denoiser among a pipeline's parts.
        text_encoders: Names of the text encoders.
        adapted: Layers that adapters go to by default: the attention's projections.
        guidance_scale: Scale of classifier-free guidance by default.
        unused: Arguments of `from_pretrained` that leave out what is not needed.
        single_file: The same of `from_single_file`; `None` where single files do not hold a whole pipeline.
    """

    wrapper: str
    pipeline_class: type[DiffusionPipeline]
    called: str
    example: str
    denoiser: str
    text_encoders: tuple[str, ...]
    adapted: tuple[str, ...]
    guidance_scale: float
    unused: Mapping[str, Any] = field(default_factory=dict)
    single_file: Mapping[str, Any] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the networks."""
        return (self.denoiser, "vae", *self.text_encoders)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigurationError: It is not one that a frozen network can be held in.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigurationError(f"dtype={name!r} is not supported; write float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def part_dtypes(family: Family, dtype: Precision, vae_dtype: Precision | None) -> dict[str, torch.dtype]:
    """What each part is held in: the autoencoder in `vae_dtype` where that is given, everything else in `dtype`."""
    dtypes = dict.fromkeys(family.parts, torch_dtype(dtype))
    return dtypes if vae_dtype is None else {**dtypes, "vae": torch_dtype(vae_dtype)}


def load_pipeline(
    family: Family,
    pretrained: str,
    dtypes: Mapping[str, torch.dtype],
    config: str | None = None,
    **left_out: None,
) -> Any:
    """Open a text-to-image pipeline of a family.

    Safetensors are preferred; pickles are read with `weights_only`; code from a repository is never run.

    Args:
        family: Which pipelines these are.
        pretrained: A shipped name, a folder, a `.safetensors` file in the original layout, or a hub id.
        dtypes: Of each part's weights, by its name.
        config: For a single file: the folder or hub id of a pipeline with the same architecture.
        **left_out: Parts to do without.

    Raises:
        ConfigurationError: It cannot be found, or is something else.
    """
    path = _shipped(pretrained) or Path(pretrained).expanduser()
    options = {**family.unused, **left_out}
    with _quiet():
        if path.is_file():
            return _single_file(family, path, dtypes, config)
        if path.is_dir():
            return _folder(family, path, dtypes, options)
        if _is_path(pretrained):
            raise ConfigurationError(
                f"{pretrained} does not exist; give a pipeline folder, a .safetensors file, a hub id such as "
                f"{family.example}, or the shipped name {_SHIPPED}"
            )
        return _hub(family, pretrained, dtypes, options)


def wrapper_of(pretrained: str) -> str:
    """Name of the class in `lightning_draft.models` that opens a pipeline; `StableDiffusion` where that is not said.

    Args:
        pretrained: As for `load_pipeline`.
    """
    path = _shipped(pretrained) or Path(pretrained).expanduser()
    if path.is_file() or (not path.is_dir() and _is_path(pretrained)):
        return "StableDiffusion"
    try:
        name = DiffusionPipeline.load_config(str(path) if path.is_dir() else pretrained).get("_class_name")
    except OSError:
        return "StableDiffusion"
    return WRAPPERS.get(str(name), "StableDiffusion")


def _shipped(name: str) -> Path | None:
    if name != _SHIPPED:
        return None
    from lightning_draft.assets import resolve

    return Path(resolve(name))


def _folder(family: Family, folder: Path, dtypes: Mapping[str, torch.dtype], options: Mapping[str, Any]) -> Any:
    if not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json; give the folder that "
            f"{family.pipeline_class.__name__}.save_pretrained wrote, not one of its parts"
        )
    options = {**_absent(family, str(folder)), **options}
    return _from_pretrained(family, str(folder), dtypes, _variant(folder / family.denoiser), options)


def _hub(family: Family, name: str, dtypes: Mapping[str, torch.dtype], options: Mapping[str, Any]) -> Any:
    try:
        options = {**_absent(family, name), **options}
        try:
            return _from_pretrained(family, name, dtypes, None, options)
        except OSError:
            return _from_pretrained(family, name, dtypes, "fp16", options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{name!r} is neither a folder here nor the shipped {_SHIPPED}, and could not be had "
            f"from the hub ({reason}); check the spelling and the connection, log in with `hf auth login` if it is "
            "private, or give a local folder"
        ) from error


def _single_file(family: Family, file: Path, dtypes: Mapping[str, torch.dtype], config: str | None) -> Any:
    if family.single_file is None:
        raise ConfigurationError(
            f"{file} is a single file, and those of {family.called} seldom hold the text encoders; give "
            f"{family.wrapper} a diffusers pipeline folder, or a hub id such as {family.example}"
        )
    if file.suffix != ".safetensors":
        raise ConfigurationError(f"{file} is not a .safetensors file; convert it, or give a diffusers pipeline folder")
    arguments = {**family.single_file, **({} if config is None else {"config": config})}
    common = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
    try:
        pipeline = family.pipeline_class.from_single_file(str(file), dtype=common, **arguments)
    except (OSError, ValueError, SingleFileComponentError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"{file} could not be opened as a Stable Diffusion checkpoint ({reason}); without a connection, name the "
            "folder of a pipeline with the same architecture as pretrained_config"
        ) from error
    for name, dtype in dtypes.items():
        nn.Module.to(getattr(pipeline, name), dtype)
    return pipeline


def _from_pretrained(
    family: Family, source: str, dtypes: Mapping[str, torch.dtype], variant: str | None, options: Mapping[str, Any]
) -> Any:
    return family.pipeline_class.from_pretrained(source, dtype=dict(dtypes), variant=variant, **options)


def _variant(denoiser: Path) -> str | None:
    """`fp16`, or whatever the files are called, where the folder has only weights with such an infix."""
    names = [file.name for file in sorted(denoiser.glob("diffusion_pytorch_model*")) if not file.name.endswith(".json")]
    infixes = [name.split(".")[1].split("-")[0] if name.count(".") > 1 else None for name in names]
    return None if None in infixes else next(iter(infixes), None)


def _absent(family: Family, source: str) -> dict[str, None]:
    """The parts that a pipeline was saved without, and that diffusers wants to be told of.

    Raises:
        ConfigurationError: It is of another family.
    """
    index = family.pipeline_class.load_config(source)
    name = index.get("_class_name")
    wrapper = WRAPPERS.get(name) if isinstance(name, str) else None
    if wrapper == family.wrapper:
        return {part: None for part, kind in index.items() if kind == [None, None]}
    advice = f"use such a pipeline, for example {family.example}"
    raise ConfigurationError(
        f"{source} is a {name}, and {family.wrapper} opens {family.called} pipelines "
        f"({family.pipeline_class.__name__}); {advice if wrapper is None else f'open it with {wrapper}'}"
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
