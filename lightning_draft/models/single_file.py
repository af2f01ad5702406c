"""Open pipelines from single files in the layout of the models' original code."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, SingleFileComponentError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import skeleton
from lightning_draft.models.families import FAMILIES, class_for_layout, class_for_pipeline
from lightning_draft.models.family import Family
from lightning_draft.models.layouts import DENOISER, GUIDANCE, layout_of, shapes_of
from lightning_draft.text import first_line
from lightning_draft.weightless import is_without_weights

_VAE = ("first_stage_model.", "vae.")
_OTHERS = (*_VAE, "text_encoders.", "cond_stage_model.", "conditioner.")
_SCALES = (".weight_scale", ".scale_weight", ".comfy_quant")
"""Ends of the keys that quantized layers have in files for ComfyUI, besides their weights."""
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def open_single_file(
    family: Family, file: Path, dtypes: Mapping[str, torch.dtype], config: str | None, omit: Sequence[str] = ()
) -> Any:
    """Open a pipeline from a `.safetensors` file; networks that the file lacks are read from `config`.

    Within `without_weights` only the file's header is read.

    Args:
        family: The family.
        file: The file.
        dtypes: Dtype of the weights of each network, by name.
        config: The folder or hub id of a pipeline with the same architecture; by default its configuration comes from
            the hub.
        omit: Components that are not loaded.

    Raises:
        ConfigurationError: The file is of another family, is damaged, or lacks networks without `config`.
    """
    if file.suffix != ".safetensors":
        raise ConfigurationError(f"{file} is not a .safetensors file; convert it, or give a diffusers pipeline folder")
    _check_family(family, file)
    if family.single_file is None:
        raise ConfigurationError(
            f"{file} is a single file, and single files of {family.title} usually lack the text encoders; give a "
            f"diffusers pipeline folder, or a hub id such as {family.example}"
        )
    config = None if config is None else expanduser(config)
    try:
        options = {**_null_components(family, config), **family.unused, **dict.fromkeys(omit)}
        present = [name for name in family.networks if name not in options]
        _check_not_scaled(family, file, present)
        absent = _absent(family, file, present)
        if absent and config is None:
            raise ConfigurationError(
                f"{file} has no {' and no '.join(absent)}; set pretrained_config to a complete pipeline from which "
                f"they are read, such as {_example(family, file)}{_advice_to_omit(family, absent)}"
            )
        if config is not None and family.denoiser in present:
            _check_guidance(family, file, config)
        if is_without_weights():
            return _without_weights(family, config or _default_config(file), dtypes, options)
        return _with_weights(family, file, dtypes, config, absent, options)
    except (*_FAILURES, SingleFileComponentError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise _not_opened(family, file, config, error) from error


def _not_opened(family: Family, file: Path, config: str | None, error: Exception) -> ConfigurationError:
    example = _example(family, file)
    if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
        advice = f", or set pretrained_config to a pipeline with its architecture, such as {example}" if config else ""
        return ConfigurationError(f"{file} lacks weights; copy or download it again{advice}")
    if config is None:
        return ConfigurationError(
            f"{file} could not be opened as a {family.title} checkpoint ({first_line(error)}); without a connection, "
            "set pretrained_config to the folder of a pipeline with the same architecture"
        )
    return ConfigurationError(
        f"{file} could not be opened with pretrained_config={config} ({first_line(error)}); give the folder or hub id "
        f"of a complete pipeline with the same architecture, such as {example}"
    )


def _with_weights(
    family: Family,
    file: Path,
    dtypes: Mapping[str, torch.dtype],
    config: str | None,
    absent: Sequence[str],
    options: Mapping[str, Any],
) -> Any:
    read: dict[str, Any] = {} if config is None else _networks_of(config, absent, family, dtypes)
    if family.opens_single_files:
        common = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
        source = {} if config is None else {"config": config}
        pipeline = family.pipeline_class.from_single_file(str(file), dtype=common, **options, **source, **read)
    else:
        assert config is not None  # the file lacks all networks but the denoiser
        if family.denoiser not in options:
            read[family.denoiser] = _denoiser(family, file, config, dtypes[family.denoiser])
        pipeline = family.pipeline_class.from_pretrained(config, **options, **read)
    for name in (name for name in dtypes if name not in options and name not in absent):
        network = getattr(pipeline, name)
        if name in family.text_encoders:
            network.tie_weights()
        _check_complete(network, file, name)
        _convert(network, dtypes[name])
    return pipeline


def _denoiser(family: Family, file: Path, config: str, dtype: torch.dtype) -> Any:
    """Open the denoiser alone, for families whose pipelines diffusers does not open from single files."""
    weights = load_file(file)
    if _has_prefix(weights):
        weights = {key.removeprefix(DENOISER): value for key, value in weights.items() if key.startswith(DENOISER)}
    kind = _class(*family.pipeline_class.load_config(config)[family.denoiser])
    return kind.from_single_file(weights, config=config, subfolder=family.denoiser, dtype=dtype)


def _has_prefix(keys: Iterable[str]) -> bool:
    """Return whether the denoiser's weights have a prefix, as in files that ComfyUI writes."""
    return any(key.startswith(DENOISER) for key in keys)


def _without_weights(family: Family, config: str, dtypes: Mapping[str, torch.dtype], options: Mapping[str, Any]) -> Any:
    options = {**_null_components(family, config), **options}
    present = {name: dtype for name, dtype in dtypes.items() if name not in options}
    return family.pipeline_class.from_pretrained(config, **options, **skeleton.networks(family, config, present))


def _null_components(family: Family, config: str | None) -> dict[str, None]:
    """Return `None` for each component that `pretrained_config` lacks; without it, for none.

    Raises:
        ConfigurationError: It is of another family.
    """
    if config is None:
        return {}
    index = family.pipeline_class.load_config(config)
    name = str(index.get("_class_name"))
    if name != family.pipeline_name and class_for_pipeline(name) != class_for_pipeline(family.pipeline_name):
        raise ConfigurationError(
            f"pretrained_config={config} is a {name} and not a {family.pipeline_name} ({family.title}); give such a "
            f"pipeline, for example {family.example}"
        )
    return {part: None for part, kind in index.items() if kind == [None, None]}


def _default_config(file: Path) -> str:
    """Return the hub id from which diffusers reads the configuration of a single file."""
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout_of(file)]["pretrained_model_name_or_path"])


def _example(family: Family, file: Path) -> str:
    """Return the hub id of a pipeline with the architecture of a file."""
    known = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(layout_of(file), {})
    return str(known.get("pretrained_model_name_or_path", family.example))


def _check_guidance(family: Family, file: Path, config: str) -> None:
    """Check that the denoiser has its guidance scale as an input in both places; diffusers would drop its weights."""
    kind = _class(*family.pipeline_class.load_config(config)[family.denoiser])
    expected = kind.load_config(config, subfolder=family.denoiser).get("guidance_embeds")
    found = any(key.removeprefix(DENOISER) == GUIDANCE for key in shapes_of(file))
    if expected is not None and bool(expected) != found:
        ours, theirs = ("with", "without") if found else ("without", "with")
        raise ConfigurationError(
            f"{file} is a model {ours} a guidance scale as an input, and pretrained_config={config} one {theirs}; give "
            f"a pipeline with the same architecture, such as {_example(family, file)}"
        )


def diffusers_code(
    family: Family,
    pretrained: str,
    config: str | None,
    omit: Sequence[str] = (),
    show: Callable[[str], str] = expanduser,
) -> str | None:
    """Return the Python expression that opens a single file in diffusers, with the networks that it lacks.

    Args:
        family: The family.
        pretrained: The model's `pretrained`.
        config: `pretrained_config`.
        omit: Components that are not loaded.
        show: Returns the name of a file, folder or hub id in the expression.

    Returns:
        The expression; `None` if `pretrained` is not a single file, or has no `config`.
    """
    file = Path(pretrained).expanduser()
    if config is None or not file.is_file():
        return None
    index = family.pipeline_class.load_config(expanduser(config))
    present = [name for name in family.networks if name not in omit and index.get(name, [None])[0] is not None]
    absent = _absent(family, file, present)
    source, place = _literal(show(pretrained)), _literal(show(config))
    omitted = "".join(f", {name}=None" for name in omit)
    if family.opens_single_files and set(present) - {*absent, family.denoiser}:
        options = f", config={place}{omitted}"
        for name in absent:
            options += f', {name}={index[name][1]}.from_pretrained({place}, subfolder="{name}")'
        return f"{family.pipeline_name}.from_single_file({source}{options})"
    if not family.opens_single_files and _has_prefix(shapes_of(file)):
        items = f"safetensors.torch.load_file({source}).items()"
        source = f'{{key.removeprefix("{DENOISER}"): value for key, value in {items}}}'
    network = f'{index[family.denoiser][1]}.from_single_file({source}, config={place}, subfolder="{family.denoiser}")'
    return f"{family.pipeline_name}.from_pretrained({place}, {family.denoiser}={network}{omitted})"


def _literal(text: str) -> str:
    """Return text as a Python string literal."""
    return json.dumps(text, ensure_ascii=False)


def _check_family(family: Family, file: Path) -> None:
    layout = layout_of(file)
    other = class_for_layout(layout)
    if other != class_for_pipeline(family.pipeline_name):
        if layout == "unknown":
            raise ConfigurationError(
                f"{file} is not a checkpoint of a known model; give one of {family.title} or a pipeline folder (a LoRA "
                "file is for lora.init)"
            )
        raise ConfigurationError(
            f"{file} is a {layout} checkpoint and not one of {family.title}; {_advice(other, layout)}"
        )


def _check_not_scaled(family: Family, file: Path, names: Sequence[str]) -> None:
    """Check that the weights of these networks are not quantized: diffusers would ignore their scales."""
    encoders = tuple(prefix for name, prefix in (family.single_file or {}).items() if name in names)
    scales = (key for key in shapes_of(file) if key.endswith(_SCALES))
    scale = next((key for key in scales if key.startswith(encoders) or not key.startswith(_OTHERS)), None)
    if scale is not None:
        raise ConfigurationError(
            f"{file} has quantized weights with scales, such as {scale}, which diffusers does not apply; give a file "
            "in bfloat16, float16 or float8 without scales"
        )


def _advice(other: str | None, layout: str) -> str:
    if other is None:
        return f"{layout} is not supported, give a file of a supported family"
    right: Family = getattr(import_module(FAMILIES[other].module), other).family
    return f"open {'a pipeline folder of it' if right.single_file is None else 'it'} with {other}"


def _absent(family: Family, file: Path, names: Sequence[str]) -> list[str]:
    """Return which of these networks a file lacks, such as all but the transformer in files of FLUX.1.

    Of families whose pipelines diffusers does not open from single files, only the denoiser is read.
    """
    others = [name for name in names if name != family.denoiser]
    if not family.opens_single_files:
        return others
    prefixes: dict[str, str | tuple[str, ...]] = {**(family.single_file or {}), str(family.vae): _VAE}
    keys = list(shapes_of(file))
    return [name for name in others if not any(key.startswith(prefixes.get(name, ())) for key in keys)]


def _advice_to_omit(family: Family, absent: Sequence[str]) -> str:
    """Return advice to omit the networks that a file lacks, if the family can do without them."""
    return f", or omit: [{', '.join(absent)}]" if set(absent) <= set(family.optional) else ""


def _networks_of(
    config: str, names: Sequence[str], family: Family, dtypes: Mapping[str, torch.dtype]
) -> dict[str, nn.Module]:
    index = family.pipeline_class.load_config(config) if names else {}
    return {name: _network(_class(*index[name]), config, subfolder=name, dtype=dtypes[name]) for name in names}


def _network(kind: Any, config: str, **options: Any) -> nn.Module:
    try:
        network: nn.Module = kind.from_pretrained(config, **options)
    except OSError:
        network = kind.from_pretrained(config, variant="fp16", **options)
    return network


def _class(library: str, name: str) -> Any:
    return getattr(import_module(library), name)


def _check_complete(network: nn.Module, file: Path, name: str) -> None:
    missing = next((parameter for parameter, value in network.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise ConfigurationError(f"{file} lacks weights, such as {name}.{missing}; copy or download it again")


def _convert(network: Any, dtype: torch.dtype) -> None:
    """Convert a network to a dtype; in float16, layers that would overflow stay float32, as in `from_pretrained`."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
