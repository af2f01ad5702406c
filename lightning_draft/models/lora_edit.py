"""Changes of LoRA files: scale, rank, weighted sums, and a scale schedule; and information about their layers."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_draft.arguments import finite, in_range, integer
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora_content import LoRAFile, Updates
from lightning_draft.models.lora_update import Update, add, truncate
from lightning_draft.models.scale_schedule import SCHEDULE, ScaleSchedule, schedule_of


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


def lora_info(file: LoRAFile) -> list[LayerInfo]:
    """Return rank, alpha and norm of each layer of a file, the largest norm first."""
    rows = [
        LayerInfo(component, layer, update.rank, update.alpha, update.norm())
        for component, layers in file.updates.items()
        for layer, update in layers.items()
    ]
    return sorted(rows, key=lambda row: -row.norm)


def scale_lora(file: LoRAFile, factor: float) -> LoRAFile:
    """Return the file with all updates multiplied by a factor; only alphas change.

    Args:
        file: From `read_lora`.
        factor: Any number; a negative one reverses the effect, and 0 gives the base model.

    Raises:
        ConfigurationError: The factor is not finite.
    """
    finite("scale", factor, "write a number such as 0.8")
    return _with_metadata(_map(file, lambda update: update.times(factor)), scaled_by=str(factor))


def anneal_lora(file: LoRAFile, schedule: ScaleSchedule) -> LoRAFile:
    """Return the file with a scale schedule in its header, which `load_lora` and `sample` apply; dW does not change.

    Args:
        file: From `read_lora`.
        schedule: Scale of the update as a function of the sampling step.
    """
    return _with_metadata(file, **{SCHEDULE: schedule.to_text()})


def resize_lora(file: LoRAFile, rank: int) -> tuple[LoRAFile, float]:
    """Return the file at another rank, by singular value decomposition of each layer's update.

    Args:
        file: From `read_lora`.
        rank: Rank of all layers, at least 1.

    Returns:
        The file, and the relative error over all layers, `sqrt(sum |dW - dW'|^2 / sum |dW|^2)`.
    """
    most = max(_smaller_side(update) for update in _every(file))
    advice = f"write at most {most}, the smaller side of the largest layer"
    in_range("rank", integer("rank", rank, advice), 1, most, advice)
    squares = [0.0, 0.0]

    def smaller(update: Update) -> Update:
        """Truncate an update, and add up the squared norms of the error and of the update."""
        kept, distance = truncate(update, rank)
        squares[0] += distance**2
        squares[1] += update.norm() ** 2
        return kept

    return _map(file, smaller), _relative(squares[0], squares[1])


def reduce_rank(file: LoRAFile, rank: int | None) -> LoRAFile:
    """Return the file of `lora.init`; reduce its rank if `lora.rank` is lower, with a warning that gives the error."""
    if rank is None or rank >= file.rank:
        return file
    resized, error = resize_lora(file, rank)
    message = f"lora.init: at rank {rank} the update of {file.path} has a relative error of {error:.2%}"
    warnings.warn(message, stacklevel=6)  # where the model is built
    return resized


def mix_loras(files: Sequence[LoRAFile], weights: Sequence[float], rank: int | None = None) -> tuple[LoRAFile, float]:
    """Compute the weighted sum of the updates of several files, `dW = sum_i w_i dW_i`.

    If a file does not adapt a layer, its `dW_i` is 0. The sum of updates of ranks `r_i` has at most the rank `sum_i
    r_i`, and is exact at this rank. A scale schedule that all files have is kept.

    Args:
        files: Files of the same model.
        weights: One for each file; negative ones subtract.
        rank: Rank of the result; by default the largest sum of the ranks of a layer, at which the result is exact.

    Returns:
        The sum, and its relative error, `sqrt(sum |dW - dW'|^2 / sum |dW|^2)` over all layers.

    Raises:
        ConfigurationError: There are no files, their number differs from that of the weights, a weight is not finite,
            or the files are of different models or have different scale schedules.
    """
    if not files or len(files) != len(weights):
        raise ConfigurationError(f"{len(files)} files and {len(weights)} weights were given; give one weight per file")
    _check_bases(files)
    schedule = _common_schedule(files)
    for file, weight in zip(files, weights, strict=True):
        finite(f"the weight of {file.path}", weight, "write a number such as 0.5")
    scaled = [scale_lora(file, weight) for file, weight in zip(files, weights, strict=True)]
    components = sorted({name for file in scaled for name in file.encoders})
    total = LoRAFile(
        files[0].path,
        files[0].base,
        _sum([file.denoiser for file in scaled]),
        {name: _sum([file.encoders.get(name, {}) for file in scaled]) for name in components},
    )
    largest = max(min(update.rank, _smaller_side(update)) for update in _every(total))
    mixed, error = resize_lora(total, largest if rank is None else rank)
    parts = [[file.path.name, weight] for file, weight in zip(files, weights, strict=True)]
    mixed = _with_metadata(mixed, mix=json.dumps(parts), relative_error=f"{error:.3g}")
    if schedule is not None:
        mixed = anneal_lora(mixed, schedule)
    hashes = {file.metadata.get("base_sha256", "") for file in files}
    return (mixed if hashes != {max(hashes)} else _with_metadata(mixed, base_sha256=max(hashes))), error


def _check_bases(files: Sequence[LoRAFile]) -> None:
    """Check that files were read for the same family; shapes are checked when the updates are added."""
    families = {file.base.family.title for file in files}
    if len(families) > 1:
        raise ConfigurationError(f"files of {' and '.join(sorted(families))} cannot be added; give files of one model")


def _common_schedule(files: Sequence[LoRAFile]) -> ScaleSchedule | None:
    """Return the scale schedule of the files, None if they have none."""
    first = schedule_of(files[0].metadata)
    other = next((file for file in files if schedule_of(file.metadata) != first), None)
    if other is not None:
        raise ConfigurationError(
            f"{files[0].path} and {other.path} have different scale schedules, and their sum has one; write for "
            "example `lightning-draft lora anneal FILE --schedule power_0` for each file with a schedule, which makes "
            "its scale constant"
        )
    return first


def _with_metadata(file: LoRAFile, **metadata: str) -> LoRAFile:
    return replace(file, metadata={**file.metadata, **metadata})


def _sum(parts: Sequence[Updates]) -> dict[str, Update]:
    layers = sorted({layer for part in parts for layer in part})
    return {layer: add([part[layer] for part in parts if layer in part]) for layer in layers}


def _every(file: LoRAFile) -> list[Update]:
    return [update for layers in file.updates.values() for update in layers.values()]


def _smaller_side(update: Update) -> int:
    return min(len(update.b), update.a[0].numel())


def _map(file: LoRAFile, change: Callable[[Update], Update]) -> LoRAFile:
    def changed(layers: Updates) -> Mapping[str, Update]:
        return {layer: change(update) for layer, update in layers.items()}

    encoders = {name: changed(layers) for name, layers in file.encoders.items()}
    return replace(file, denoiser=changed(file.denoiser), encoders=encoders)


def _relative(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0
