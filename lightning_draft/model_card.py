"""Model cards of exported LoRA files, with the front matter that the Hugging Face hub reads, and their upload."""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from lightning_draft.assets import NAMES
from lightning_draft.card_usage import usage
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.methods.validation_record import Change
from lightning_draft.models.loading import public_name
from lightning_draft.models.lora import DEFAULT_RANK
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.models.scale_schedule import SCHEDULE, ScaleSchedule
from lightning_draft.models.single_file import diffusers_code
from lightning_draft.text import one_line

CARD = "README.md"
GRID = "images/before_after.png"
WIDGET = "images/{}.png"
UNKNOWN_LICENSE = "license-of-the-base-model"
_SILENCE = 60.0  # seconds
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Results:
    """What a card shows besides the metadata of the file.

    Args:
        changes: Mean scores before and after training by reward, of a validation.
        prompts: Prompts of the images `WIDGET` of the fine-tuned model; if there are some, `GRID` compares the models.
        settings: Further settings of the run.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def model_card(
    title: str,
    header: Mapping[str, str],
    pipeline: str,
    rank: int | None,
    comfy: bool,
    file: str = "best",
    results: Results = Results(),
    task: str = "text-to-image",
    opening: str | None = None,
) -> str:
    """Write the card of a LoRA: front matter, images, scores, settings, code that loads it, and license.

    Args:
        title: Name of the model.
        header: Metadata of the file: `base`, `base_sha256`, `scale_schedule`, `reward`, `method`, `sampler`, `step` and
            `scores`.
        pipeline: Class of diffusers that opens the base model.
        rank: Rank of the adapters.
        comfy: Whether there is a file for ComfyUI.
        file: Name of the file for diffusers, without its suffix.
        results: Scores, images and further settings.
        task: What the pipeline does, in the hub's terms.
        opening: Python expression that opens the base model in diffusers, if its name is not enough.
    """
    base = header["base"]
    schedule = ScaleSchedule.from_text(header[SCHEDULE]) if SCHEDULE in header else None
    terms = base_license(base)
    front = yaml.safe_dump(_front_matter(title, base, terms, results, task), sort_keys=False, allow_unicode=True)
    settings = {"rank": rank, **{key: value for key, value in header.items() if key != "scores"}, **results.settings}
    lines = [
        f"---\n{front}---\n\n# {_plain(title)}\n",
        f"A LoRA for {_code(base)}, fine-tuned on a reward with Lightning-Draft.\n",
        *_gallery(results.prompts),
        *_score_table(results.changes),
        "## Settings\n",
        *[f"- {_plain(key)}: {_code(value)}" for key, value in settings.items() if value is not None],
        *usage(base, pipeline, f"{file}.safetensors", schedule, opening),
    ]
    if comfy:
        lines.append(
            f"\n## Use in ComfyUI\n\nPut `{file}.comfy.safetensors` into `models/loras` and add a *Load LoRA* node."
        )
    name = terms.get("license_name", terms["license"])
    known = name != UNKNOWN_LICENSE
    lines.append(f"\n## License\n\nThe license of the base model applies{f': {_code(name)}' if known else ''}.")
    return "\n".join(lines) + "\n"


def has_card(model: object) -> TypeGuard[PipelineModel]:
    """Return whether files of this model have a card: whether it is a pipeline with adapters."""
    return isinstance(model, PipelineModel) and model.lora is not None


def write_card(
    model: PipelineModel, path: Path, header: Mapping[str, str], comfy: bool, results: Results = Results()
) -> str:
    """Write the card of a LoRA file beside it, and return it.

    Args:
        model: The model whose adapters the file contains.
        path: The file.
        header: Its metadata.
        comfy: Whether files for ComfyUI are written if the family supports them.
        results: Scores, images and further settings.
    """
    has_comfy = comfy and model.has_comfy_names
    title = path.parent.parent.name or path.stem
    rank = DEFAULT_RANK if model.lora is None else model.lora.rank or DEFAULT_RANK
    family = model.family
    opening = diffusers_code(family, model.source, model.pretrained_config, model.omitted, public_name)
    card = model_card(
        title, header, family.pipeline_name, rank, has_comfy, path.stem, results, family.task, opening=opening
    )
    with atomic_path(path.parent / CARD) as partial:
        partial.write_text(card, encoding="utf-8")
    return card


def base_license(base: str) -> dict[str, str]:
    """Return the license of a base model as front matter: that of its card in its folder or in the hub's cache."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if base in NAMES:
        return {"license": "apache-2.0"}
    unknown = {"license": "other", "license_name": UNKNOWN_LICENSE}
    cached = try_to_load_from_cache(base, CARD) if _is_hub_id(base) else Path(base) / CARD
    if not isinstance(cached, (str, Path)) or not Path(cached).is_file():
        return unknown
    try:
        text = Path(cached).read_text(encoding="utf-8")
        front: Any = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except (OSError, ValueError, yaml.YAMLError):
        return unknown
    if not isinstance(front.get("license"), str):
        return unknown
    return {key: str(front[key]) for key in ("license", "license_name", "license_link") if front.get(key)}


def _is_hub_id(base: str) -> bool:
    return _HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def _front_matter(title: str, base: str, terms: Mapping[str, str], results: Results, task: str) -> dict[str, Any]:
    metrics = [metric for name, change in results.changes.items() for metric in _metrics(name, change)]
    result = {"task": {"type": task}, "dataset": {"type": "prompts", "name": "held-out prompts"}}
    widget = [{"text": one_line(p), "output": {"url": WIDGET.format(i)}} for i, p in enumerate(results.prompts)]
    return {
        **({"base_model": base} if _is_hub_id(base) else {}),
        **terms,
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": [task, "diffusers", "lora", "reward-fine-tuning", "lightning-draft"],
        **({"widget": widget} if widget else {}),
        **({"model-index": [{"name": title, "results": [{**result, "metrics": metrics}]}]} if metrics else {}),
    }


def _metrics(name: str, change: Change) -> list[dict[str, Any]]:
    error = {} if math.isnan(change.error) else {"args": {"standard_error": change.error}}
    return [
        {"type": name, "name": name, "value": change.after},
        {"type": name, "name": f"{name}, base model", "value": change.before},
        {"type": name, "name": f"{name}, gain", "value": change.after - change.before, **error},
    ]


def _gallery(prompts: Sequence[str]) -> list[str]:
    """Return lines with the comparison of both models."""
    if not prompts:
        return []
    return [f"![Images of the base model and of the fine-tuned model for the same prompts and noise]({GRID})\n"]


def _score_table(changes: Mapping[str, Change]) -> list[str]:
    """Return lines of a table of scores before and after training; a pair of images has the same prompt and noise."""
    if not changes:
        return []
    count = next(iter(changes.values())).count
    return [
        f"## Scores of {count} images of held-out prompts\n",
        "| reward | before training | after | gain (standard error) |",
        "|---|--:|--:|--:|",
        *[
            f"| {_plain(n)} | {c.before:.4g} | {c.after:.4g} | {c.after - c.before:+.4g} ({c.error:.2g}) |"
            for n, c in changes.items()
        ],
        "",
    ]


def _plain(text: str) -> str:
    """Return text as one line of Markdown with special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", one_line(text))


def _code(text: object) -> str:
    """Return text as one line of code in Markdown, whatever backticks it contains."""
    line = one_line(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def check_repository(name: str) -> str:
    """Return the name of a repository on the hub.

    Raises:
        ConfigurationError: It is not of the form `owner/name`, or the hub is switched off.
    """
    if _HUB_ID.fullmatch(name) is None:
        raise ConfigurationError(f"export.push_to_hub={name!r} must be owner/name, such as me/my-lora")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ConfigurationError("export.push_to_hub needs a connection, but HF_HUB_OFFLINE is set; unset it")
    return name


def upload(folder: Path, repository: str) -> bool:
    """Upload a run's files and print the address; if the upload fails, give a warning with the command to repeat it.

    Args:
        folder: Folder of the files.
        repository: `owner/name`.

    Returns:
        Whether the files were uploaded.
    """
    try:
        print(f"uploaded to {push_to_hub(folder, repository)}", flush=True)
        return True
    except Exception as error:  # any error of the connection or the hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"the upload failed ({reason}); to repeat it, write hf upload --private {repository} {folder}", stacklevel=2
        )
        return False


def push_to_hub(folder: str | Path, repository: str, endpoint: str | None = None) -> str:
    """Upload LoRA files, their card and its images; a repository that does not exist is created as a private one.

    The token is that of `hf auth login` or of the environment variable `HF_TOKEN`. A request without an answer for 60
    seconds is an error.

    Args:
        folder: Folder of `README.md`, the `.safetensors` files and `images`.
        repository: `owner/name`.
        endpoint: Address of the hub; by default that of huggingface_hub.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi, get_session

    api, client = HfApi(endpoint=endpoint), get_session()
    before, client.timeout = client.timeout, _SILENCE  # its own default is to wait without a limit
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[CARD, "*.safetensors", "images/*.png"],
            commit_message="Add LoRA",
        )
    finally:
        client.timeout = before
    return str(commit.commit_url)
