"""Low-rank adapters: `W + (alpha / rank) B A`, with `B` = 0 at the start, held in float32 whatever the base is in.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.loading import Family

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoRA:
    """Which layers are adapted, and how.

    Args:
        rank: Rank of the update, at least 1.
        alpha: The update is scaled by `alpha / rank`; by default `rank`, a scale of 1.
        target_modules: Layers, by the end of their names; by default the projections of the model's attention.
        seed: Of the initial values of `A`; by default they come from torch's global generator.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: Sequence[str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"rank={self.rank} must be at least 1; write 4 to 64")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigurationError(f"alpha={self.alpha} must be positive; leave it out for alpha = rank")
        if isinstance(self.target_modules, str) or (self.target_modules is not None and not self.target_modules):
            raise ConfigurationError(
                f"target_modules={self.target_modules!r} must be a list of layer names, such as [to_q, to_k, to_v]"
            )

    @property
    def scale(self) -> float:
        """What multiplies `B A`: `alpha / rank`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def config(self, default: Sequence[str] = ATTENTION) -> LoraConfig:
        """The same for peft, on the layers of `default` where none are named."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=list(self.target_modules or default),
            init_lora_weights=True,
        )

    def attach(self, network: ModelMixin, default: Sequence[str] = ATTENTION) -> None:
        """Add trainable float32 adapters to a network, whose function stays what it was.

        Args:
            network: The denoiser.
            default: Layers to adapt where none are named.

        Raises:
            ConfigurationError: No layer of the network has one of the names.
        """
        with nullcontext() if self.seed is None else torch.random.fork_rng():
            if self.seed is not None:
                torch.manual_seed(self.seed)
            self._inject(network, self.config(default))
            # peft casts to the base's dtype, which would round A: draw it again in float32.
            for layer in layers(network):
                layer.lora_A[ADAPTER].float()
                layer.lora_B[ADAPTER].float()
                layer.reset_lora_parameters(ADAPTER, True)

    def _inject(self, network: ModelMixin, config: LoraConfig) -> None:
        try:
            network.add_adapter(config, ADAPTER)
        except ValueError as error:
            wanted = sorted(config.target_modules)
            linear = {".".join(n.split(".")[-1:]) for n, m in network.named_modules() if isinstance(m, nn.Linear)}
            names = sorted(name for name in linear if not name.isdigit())
            raise ConfigurationError(
                f"target_modules={wanted} cannot be adapted ({error}); this network's linear layers "
                f"are to_out.0, {', '.join(names)}"
            ) from error


def layers(network: nn.Module) -> list[LoraLayer]:
    """The adapted layers of a network."""
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within this context adapters are not evaluated at all, and their `requires_grad` is left alone."""
    before = [(layer, layer.disable_adapters) for layer in layers(network)]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in before:
            layer._disable_adapters = value


@contextmanager
def scaled(network: nn.Module, scale: float) -> Iterator[None]:
    """Within this context the network's weights are `theta + scale dW`; contexts inside each other multiply."""
    before = [(layer, layer.scaling[ADAPTER]) for layer in layers(network)]
    try:
        for layer, value in before:
            layer.scaling[ADAPTER] = scale * value
        yield
    finally:
        for layer, value in before:
            layer.scaling[ADAPTER] = value


def save(
    network: ModelMixin,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    family: Family,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a file that the pipeline's `load_lora_weights` opens, in the format that diffusers itself writes.

    Args:
        network: With adapters.
        path: Ends in `.safetensors`; folders on the way are made.
        metadata: Text to keep in the file's header.
        family: Of the pipeline.
        values: The adapters by their names in the network, where it holds a part of them only.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"{path} must end in .safetensors, or diffusers does not find it")
    if values is None:
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    else:  # peft would look for their names in a network whose modules FSDP has renamed
        state = {name.replace(f".{ADAPTER}.", "."): value for name, value in values.items()}
    tensors = {f"{family.denoiser}.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}
    config = {f"{family.denoiser}.{key}": value for key, value in network.peft_config[ADAPTER].to_dict().items()}
    header = {
        **metadata,
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted, indent=2, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)


@torch.no_grad()
def load(network: ModelMixin, path: str | os.PathLike[str], family: Family) -> None:
    """Copy a LoRA file into the adapters that the network has, in place.

    A file whose `alpha / rank` differs is rescaled, so that the update is the file's.

    Args:
        network: With adapters of the same rank on the same layers.
        path: A `.safetensors` file that `save` or diffusers wrote.
        family: Of the pipeline.

    Raises:
        ConfigurationError: There is no such file, or it does not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"there is no LoRA file {file}; give the path of a .safetensors file")
    # Stable Diffusion's reader returns alphas between the two.
    state, *alphas, metadata = family.pipeline_class.lora_state_dict(
        str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True
    )
    state = _network_part(state, file, family.denoiser)
    own = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    _check_fit(network, own, state, file)
    said = {**(metadata or {}), **((alphas[0] or {}) if alphas else {})}
    settings = {key.removeprefix(f"{family.denoiser}."): value for key, value in said.items()}
    scales = {layer: _scale(state, layer, settings) for layer in _layer_names(state)}
    for name, target in own.items():
        layer, factor, _ = name.rsplit(".", 2)
        source = state[name].to(target)
        ratio = scales[layer] / network.get_submodule(layer).scaling[ADAPTER] if factor == "lora_B" else 1.0
        target.copy_(source if ratio == 1 else source * ratio)


def _network_part(state: Mapping[str, Tensor], file: Path, denoiser: str) -> dict[str, Tensor]:
    """The part for the denoiser, with peft's names."""
    others = sorted(key for key in state if not key.startswith(f"{denoiser}."))
    if others:
        raise ConfigurationError(
            f"{file} also adapts something other than the denoiser ({others[0]}), which is frozen here; "
            "give a LoRA file of the denoiser alone"
        )
    stripped = {key.removeprefix(f"{denoiser}."): value for key, value in state.items()}
    return stripped if any("lora_A" in key for key in stripped) else convert_unet_state_dict_to_peft(stripped)


def _check_fit(network: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
    odd = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if not odd:
        return
    ranks = sorted({value.shape[1] for key, value in state.items() if "lora_B" in key})
    targets = _targets(network, _layer_names(state))
    raise ConfigurationError(
        f"{file} does not fit this model's adapters ({odd[0]}): it has rank {', '.join(map(str, ranks))} on "
        f"{', '.join(targets)}; build the model with lora=LoRA(rank={ranks[-1] if ranks else 8}, "
        f"target_modules={targets})"
    )


def _layer_names(state: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.rsplit(".", 2)[0] for key in state})


def _targets(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """The shortest `target_modules` that name these layers of a network, and none of its others."""
    known = {name for name, _ in network.named_modules()}

    def shortest(layer: str) -> str:
        parts = layer.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts))]
        named = ({name for name in known if name.endswith(f".{ending}")} for ending in endings)
        return next((end for end, names in zip(endings, named, strict=True) if names <= {*layers}), layer)

    return sorted({shortest(layer) for layer in layers})


def _scale(state: Mapping[str, Tensor], layer: str, settings: Mapping[str, Any]) -> float:
    """`alpha / rank` of a layer in the file; diffusers takes a missing alpha for the rank."""
    rank = state[f"{layer}.lora_B.weight"].shape[1]
    for key in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if settings.get(key):
            raise ConfigurationError(f"the LoRA file uses {key}, which is not supported; give one with a single alpha")
    return float(settings.get(f"{layer}.alpha", settings.get("lora_alpha", rank))) / rank
