"""Precision of the weights of a pipeline's networks."""

from dataclasses import replace
from typing import Any

import torch

from lightning_draft.arguments import one_of
from lightning_draft.models.decoder import Memory, Precision
from lightning_draft.models.family import Family


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        ConfigurationError: The dtype is not supported for frozen networks.
    """
    dtype: torch.dtype = getattr(torch, one_of("dtype", name, ("float32", "bfloat16", "float16")))
    return dtype


def network_dtypes(family: Family, dtype: Precision, memory: Memory, *, trains_weights: bool) -> dict[str, torch.dtype]:
    """Return the dtype in which the weights of each network are loaded, by name.

    Args:
        family: The family.
        dtype: Precision of the frozen networks.
        memory: Options of the decoder.
        trains_weights: Whether the denoiser's own weights are trained, which are then float32.
    """
    dtypes = dict.fromkeys(family.networks, torch_dtype(dtype))
    if memory.vae_dtype is not None:
        dtypes["vae"] = torch_dtype(memory.vae_dtype)
    elif family.upcast_vae:  # until its config has been read
        dtypes["vae"] = torch.float32
    if trains_weights:
        dtypes[family.denoiser] = torch.float32
    return dtypes


def set_decoder_precision(family: Family, vae: Any, dtype: Precision, memory: Memory) -> Memory:
    """Convert an autoencoder whose config does not demand float32, and return the options of the decoder.

    Args:
        family: The family.
        vae: The autoencoder, loaded with `network_dtypes`.
        dtype: Precision of the frozen networks.
        memory: Options of the decoder.
    """
    if not family.upcast_vae or memory.vae_dtype is not None:
        return memory
    if vae.config.get("force_upcast"):
        return replace(memory, vae_dtype="float32")
    vae.to(torch_dtype(dtype))
    return memory
