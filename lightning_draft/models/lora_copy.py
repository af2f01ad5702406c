"""Copy a LoRA file into the adapters of a network, after checking that it fits."""

from collections.abc import Mapping, Sequence

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora import ADAPTER, shortened
from lightning_draft.models.lora_files import LoRAFile


def check_layers(network: nn.Module, file: LoRAFile) -> None:
    """Check that a network has the layers of a file.

    Raises:
        ConfigurationError: Some layers are missing.
    """
    foreign = [layer for layer in file.layers if not _is_layer(network, layer)]
    if foreign:
        raise ConfigurationError(
            f"{file.path} is a LoRA for another model: {len(foreign)} of its {len(file.layers)} layers are not in "
            f"this model, such as {shortened(foreign, 2)}; give a file that was trained on this model"
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
        mismatched = [layer for layer in file.layers if not _shapes_fit(own, layer, file)]
        if not mismatched:
            return
        raise ConfigurationError(
            f"{file.path} is a LoRA for another model: {len(mismatched)} layers have other shapes in this model, such "
            f"as {shortened(mismatched, 2)}; give a file that was trained on this model"
        )
    targets = _targets(network, file.layers)
    hint = f", target_modules={targets}" if len(targets) <= 40 else ""
    raise ConfigurationError(
        f"{file.path} does not fit this model's adapters, which have rank {rank} on {len(names)} layers: it has rank "
        f"{file.rank} on {shortened(targets)} ({len(file.layers)} layers); build the model with "
        f"lora=LoRA(rank={file.rank}{hint}), or with lora=None to use those of the file"
    )


def _is_layer(network: nn.Module, layer: str) -> bool:
    try:
        network.get_submodule(layer)
    except AttributeError:
        return False
    return True


def _shapes_fit(own: Mapping[str, Tensor], layer: str, file: LoRAFile) -> bool:
    a, b = file.denoiser[layer].a, file.denoiser[layer].b
    own_a, own_b = own[f"{layer}.lora_A.weight"], own[f"{layer}.lora_B.weight"]
    return own_a.shape[1:] == a.shape[1:] and (own_b.shape[0], own_b.shape[2:]) == (b.shape[0], b.shape[2:])


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
