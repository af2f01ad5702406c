"""Changes of LoRA files: scale, rank and weighted sums; and information about their layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_draft.arguments import finite
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora_files import LoRAFile, Updates
from lightning_draft.models.lora_update import Update, add, truncate


@dataclass(frozen=True)
class LayerInfo:
    """Information about one layer of a LoRA file.

    Args:
        component: Component of the pipeline, such as `unet`.
        layer: Name of the layer in the component.
        rank: Rank of the update.
        alpha: The update is `alpha / rank` times `B A`.
        norm: Frobenius norm of the update, `|dW|`.
    """

    component: str
    layer: str
    rank: int
    alpha: float
    norm: float


def info(file: LoRAFile, denoiser: str = "unet") -> list[LayerInfo]:
    """Return rank, alpha and norm of each layer of a file, the largest norm first.

    Args:
        file: From `model.read_lora`.
        denoiser: Name of the denoiser in the pipeline.
    """
    rows = [
        LayerInfo(component, layer, update.rank, update.alpha, update.norm())
        for component, layers in {denoiser: file.denoiser, **file.encoders}.items()
        for layer, update in layers.items()
    ]
    return sorted(rows, key=lambda row: -row.norm)


def scale(file: LoRAFile, factor: float) -> LoRAFile:
    """Return the file with all updates multiplied by a factor; only alphas change.

    Raises:
        ConfigurationError: The factor is not finite.
    """
    finite("scale", factor, "write a number such as 0.8")
    return _map(file, lambda update: update.times(factor))


def resize(file: LoRAFile, rank: int) -> tuple[LoRAFile, float]:
    """Return the file at another rank, by singular value decomposition of each layer's update.

    Args:
        file: From `model.read_lora`.
        rank: Rank of all layers, at least 1.

    Returns:
        The file, and the relative error over all layers, `sqrt(sum |dW - dW'|^2 / sum |dW|^2)`.
    """
    squares = [0.0, 0.0]

    def smaller(update: Update) -> Update:
        kept, distance = truncate(update, rank)
        squares[0] += distance**2
        squares[1] += update.norm() ** 2
        return kept

    return _map(file, smaller), _relative(squares[0], squares[1])


def mix(files: Sequence[LoRAFile], weights: Sequence[float], rank: int | None = None) -> tuple[LoRAFile, float]:
    """Compute the weighted sum of the updates of several files, `dW = sum_i w_i dW_i`.

    If a file does not adapt a layer, its `dW_i` is 0. The sum of updates of ranks `r_i` has at most the rank `sum_i
    r_i`, and is exact at this rank.

    Args:
        files: Files of the same model.
        weights: One for each file; negative ones subtract.
        rank: Rank of the result; by default, for each layer, the sum of its ranks, at which the result is exact.

    Returns:
        The sum, and its relative error, `sqrt(sum |dW - dW'|^2 / sum |dW|^2)` over all layers.

    Raises:
        ConfigurationError: There are no files, their number differs from that of the weights, a weight is not finite,
            or a layer has different shapes.
    """
    if not files or len(files) != len(weights):
        raise ConfigurationError(f"{len(files)} files and {len(weights)} weights were given; give one weight per file")
    scaled = [scale(file, weight) for file, weight in zip(files, weights, strict=True)]
    components = sorted({name for file in scaled for name in file.encoders})
    total = LoRAFile(
        files[0].path,
        _sum([file.denoiser for file in scaled]),
        {name: _sum([file.encoders.get(name, {}) for file in scaled]) for name in components},
    )
    everything = [*total.denoiser.values(), *(u for layers in total.encoders.values() for u in layers.values())]
    return resize(total, max(update.rank for update in everything) if rank is None else rank)


def _sum(parts: Sequence[Updates]) -> dict[str, Update]:
    layers = sorted({layer for part in parts for layer in part})
    return {layer: add([part[layer] for part in parts if layer in part]) for layer in layers}


def _map(file: LoRAFile, change: Callable[[Update], Update]) -> LoRAFile:
    def changed(layers: Updates) -> Mapping[str, Update]:
        return {layer: change(update) for layer, update in layers.items()}

    encoders = {name: changed(layers) for name, layers in file.encoders.items()}
    return replace(file, denoiser=changed(file.denoiser), encoders=encoders)


def _relative(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0
