"""Recognize the architecture of a single file from its header."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from lightning_draft.errors import ConfigurationError
from lightning_draft.text import first_line

DENOISER = "model.diffusion_model."
"""Prefix of the denoiser's weights in files with several networks."""
_OWN_LAYOUTS = {
    "pixart": ("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight"),
    "qwen_image": ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
}
"""Keys of architectures that diffusers does not recognize, or takes for another one (PixArt for Sana)."""
GUIDANCE = "guidance_in.in_layer.weight"
"""Key of FLUX.1 dev and FLUX.2 dev, which have their guidance scale as an input."""


def layout_of(file: Path) -> str:
    """Return diffusers' name of a single file's architecture, such as `v1` or `xl_base`, from its header.

    It is `unknown` for a file of another kind, such as a LoRA; for diffusers that is `v1`. FLUX.2 Klein is
    `flux-2-klein`; for diffusers that is `flux-2-dev`.
    """
    shapes = shapes_of(file)
    layout = _inferred(shapes)
    names = {key.removeprefix(DENOISER) for key in shapes}
    own = next((name for name, keys in _OWN_LAYOUTS.items() if names.issuperset(keys)), None)
    if own is not None:
        return own
    if layout == "flux-2-dev" and GUIDANCE not in names:
        return "flux-2-klein"
    is_stable_diffusion = any(key.startswith(f"{DENOISER}input_blocks.") for key in shapes)
    return "unknown" if layout == "v1" and not is_stable_diffusion else layout


def _inferred(shapes: Mapping[str, Sequence[int]]) -> str:
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        return str(infer_diffusers_model_type(tensors))
    except (LookupError, NameError):  # keys or shapes that no published checkpoint has
        return "unknown"


def shapes_of(file: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a file, by their keys."""
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigurationError(
            f"{file} is damaged or not a safetensors file ({first_line(error)}); copy or download it again"
        ) from error
