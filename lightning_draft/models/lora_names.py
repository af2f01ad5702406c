"""Names of layers in the LoRA files of ComfyUI, Forge and AUTOMATIC1111.

For Stable Diffusion these are the names of kohya's training scripts, with underscores instead of dots; for SDXL they
are the names of the original network instead of those of diffusers. For diffusion transformers ComfyUI reads diffusers'
names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_draft.errors import ConfigurationError

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def same_name(layer: str, config: Any) -> str:
    """Return diffusers' name of a denoiser's layer."""
    return layer


def original_unet_name(layer: str, config: Any) -> str:
    """Return the name of a layer of diffusers' UNet in the original implementation, such as `input_blocks.4.1.proj_in`.

    Args:
        layer: Its name in diffusers, such as `down_blocks.1.attentions.0.proj_in`.
        config: Config of the UNet.
    """
    if layer in _OUTER:
        return _OUTER[layer]
    if found := _MIDDLE.fullmatch(layer):
        kind, number, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(kind, rest)}"
    if not (found := _BLOCK.fullmatch(layer)):
        return layer
    side, block, kind, number, rest = found.groups()
    per_block = config.layers_per_block + 1
    if side == "down":
        place = 1 + int(block) * per_block + (config.layers_per_block if kind == "downsamplers" else int(number))
        return f"input_blocks.{place}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    last = config.layers_per_block if kind == "upsamplers" else int(number)
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 1 + ("Attn" in config.up_block_types[int(block)])}[kind]
    return f"output_blocks.{int(block) * per_block + last}.{inner}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind == "downsamplers":
        return rest.replace("conv", "op")
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


@dataclass(frozen=True)
class ComfyNames:
    """Names of a family's layers in ComfyUI's LoRA files.

    Args:
        prefixes: Prefixes by component of the pipeline, such as `{"unet": "lora_unet_"}`.
        architecture: Values of the metadata fields `modelspec.architecture` and `ss_base_model_version`, from the
            denoiser's config.
        denoiser_name: The name of a denoiser's layer, from diffusers' name and the denoiser's config.
        underscores: Whether dots are replaced by underscores and factors are named `lora_down` and `lora_up`, as in
            kohya's scripts.
    """

    prefixes: Mapping[str, str]
    architecture: Callable[[Any], tuple[str, str]]
    denoiser_name: Callable[[str, Any], str] = same_name
    underscores: bool = True

    @property
    def suffixes(self) -> tuple[str, str]:
        """Suffixes of the tensors `A` and `B`."""
        return (".lora_down.weight", ".lora_up.weight") if self.underscores else (".lora_A.weight", ".lora_B.weight")

    def key(self, component: str, layer: str, config: Any = None) -> str:
        """Return the name of a layer in the file.

        Args:
            component: Component of the pipeline, such as `unet`.
            layer: The layer in the component.
            config: Config of the denoiser; `None` for a layer of a text encoder.

        Raises:
            ConfigurationError: The component has no names in ComfyUI.
        """
        if component not in self.prefixes:
            raise ConfigurationError(f"the layer names of {component} in ComfyUI are not known; use format diffusers")
        name = with_text_model(component, layer) if config is None else self.denoiser_name(layer, config)
        return self.prefixes[component] + (name.replace(".", "_") if self.underscores else name)

    def lookup(self, denoiser: str, networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
        """Return component and layer by each possible name in a file, including diffusers' names of the denoiser.

        Args:
            denoiser: The component that is the denoiser.
            networks: The components.
        """
        found: dict[str, tuple[str, str]] = {}
        for component, network in networks.items():
            config: Any = network.config if component == denoiser else None
            prefix = self.prefixes.get(component)
            for layer, _ in network.named_modules() if prefix is not None else ():
                plain = layer.replace(".", "_") if self.underscores else layer
                found.setdefault(f"{prefix}{plain}", (component, layer))
                found[self.key(component, layer, config)] = (component, layer)
        return found


def with_text_model(component: str, layer: str) -> str:
    """Return the name of a text encoder's layer in files; recent releases of transformers omit `text_model`."""
    is_clip = layer.startswith("encoder.layers.") and component.startswith("text_encoder")
    return f"text_model.{layer}" if is_clip else layer
