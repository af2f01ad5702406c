"""Copy a LoRA file into the adapters of a network, after checking that it fits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora import ADAPTER, shortened
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.models.lora_update import Update


def check_layers(networks: Mapping[str, nn.Module], file: LoRAFile, denoiser: str) -> None:
    """Check that networks have the layers of a file, with the same shapes.

    Args:
        networks: The denoiser and the text encoders, by their names in the pipeline.
        file: The file.
        denoiser: Name of the denoiser.

    Raises:
        ConfigurationError: Some layers are missing or have other shapes.
    """
    for component, updates in {denoiser: file.denoiser, **file.encoders}.items():
        layers = {name: _layer(networks[component], name) for name in updates}
        missing = sorted(name for name, layer in layers.items() if layer is None)
        others = sorted(name for name, layer in layers.items() if not _shape_fits(layer, updates[name]))
        if missing or others:
            of = "" if component == denoiser else f" of {component}"
            reason = "are not in this model" if missing else "have other shapes in this model"
            raise ConfigurationError(
                f"{file.path} is a LoRA for another model: {len(missing or others)} of its {len(updates)} layers{of} "
                f"{reason}, such as {shortened(missing or others, 2)}; give a file that was trained on this model"
            )


@torch.no_grad()
def copy_into(network: nn.Module, file: LoRAFile) -> None:
    """Copy a file's factors into the adapters of a network, in place; `B` is rescaled so that the update is the same.

    If a layer has a lower rank than the adapters, it fills their first rows and columns; the rest of `B` becomes 0.

    Raises:
        ConfigurationError: The layers are not those of the adapters, or the file has a higher rank.
    """
    own = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    _check_fit(network, own, file)
    for layer, update in file.denoiser.items():
        ratio = update.scale / network.get_submodule(layer).scaling[ADAPTER]  # type: ignore[index]
        own_a, own_b = own[f"{layer}.lora_A.weight"], own[f"{layer}.lora_B.weight"]
        own_a[: update.rank].copy_(update.a)
        own_b.zero_()
        own_b[:, : update.rank].copy_(update.b if ratio == 1 else update.b.to(own_b) * ratio)


def _check_fit(network: nn.Module, own: Mapping[str, Tensor], file: LoRAFile) -> None:
    names = {key.rsplit(".", 2)[0] for key in own}
    rank = len(next(value for key, value in own.items() if "lora_A" in key))
    if names == set(file.denoiser) and file.rank <= rank:
        return
    targets = _targets(network, file.layers)
    hint = f", target_modules={targets}" if len(targets) <= 40 else ""
    raise ConfigurationError(
        f"{file.path} does not fit this model's adapters, which have rank {rank} on {len(names)} layers: it has rank "
        f"{file.rank} on {shortened(targets)} ({len(file.layers)} layers); build the model with "
        f"lora=LoRA(rank={file.rank}{hint}), or with lora=None to use those of the file"
    )


def _layer(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _shape_fits(layer: Any, update: Update) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.shape == (len(update.b), *update.a.shape[1:])


def _targets(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the shortest `target_modules` that select exactly these layers of a network."""
    known = {name for name, _ in network.named_modules()}

    def shortest(layer: str) -> str:
        """Return the shortest ending of a layer's name that only the given layers have."""
        parts = layer.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts))]
        named = ({name for name in known if name.endswith(f".{ending}")} for ending in endings)
        return next((end for end, names in zip(endings, named, strict=True) if names <= {*layers}), layer)

    return sorted({shortest(layer) for layer in layers})
