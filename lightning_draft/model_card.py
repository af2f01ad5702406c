"""Model cards of exported LoRA files, with the front matter that the Hugging Face hub reads, and their upload."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import yaml

from lightning_draft.assets import NAMES
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.models.families import class_for_pipeline
from lightning_draft.models.lora import DEFAULT_RANK
from lightning_draft.models.pipeline import PipelineModel
from lightning_draft.text import one_line

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    title: str, header: Mapping[str, str], pipeline: str, rank: int | None, comfy: bool, file: str = "best"
) -> str:
    """Write the card of a LoRA: front matter, scores, settings, license, and code that loads it.

    Args:
        title: Name of the model.
        header: Metadata of the file: `base`, `base_sha256`, `reward`, `method`, `sampler`, `step` and `scores`.
        pipeline: Class of diffusers that opens the base model.
        rank: Rank of the adapters.
        comfy: Whether there is a file for ComfyUI.
        file: Name of the file for diffusers, without its suffix.
    """
    base, scores = header["base"], json.loads(header.get("scores", "{}"))
    front = yaml.safe_dump(_front_matter(title, base, scores), sort_keys=False)
    settings = {"rank": rank, **{key: value for key, value in header.items() if key != "scores"}}
    lines = [
        f"---\n{front}---\n\n# {_plain(title)}\n",
        f"A LoRA for {_code(base)}, fine-tuned on a reward with Lightning-Draft.\n",
        *_score_table(scores),
        "## Settings\n",
        *[f"- {_plain(key)}: {_code(value)}" for key, value in settings.items() if value is not None],
        *_usage(base, pipeline, f"{file}.safetensors"),
    ]
    if comfy:
        lines.append(
            "\n## Use in ComfyUI\n\nPut `best.comfy.safetensors` into `models/loras` and add a *Load LoRA* node."
        )
    lines.append("\n## License\n\nThe license of the base model applies.")
    return "\n".join(lines) + "\n"


def write_card(model: object, path: Path, header: Mapping[str, str], comfy: bool) -> None:
    """Write the card of a LoRA file beside it, if the model is a pipeline with adapters.

    Args:
        model: The model whose adapters the file contains.
        path: The file.
        header: Its metadata.
        comfy: Whether files for ComfyUI are written if the family supports them.
    """
    if not isinstance(model, PipelineModel) or model.lora is None:
        return
    has_comfy = comfy and model.family.comfy is not None
    title = path.parent.parent.name or path.stem
    card = model_card(title, header, model.family.pipeline_name, model.lora.rank or DEFAULT_RANK, has_comfy, path.stem)
    with atomic_path(path.parent / CARD) as partial:
        partial.write_text(card, encoding="utf-8")


def _front_matter(title: str, base: str, scores: Mapping[str, float]) -> dict[str, Any]:
    metrics = [{"type": name, "name": name, "value": value} for name, value in _final(scores).items()]
    result = {"task": {"type": "text-to-image"}, "dataset": {"type": "prompts", "name": "held-out prompts"}}
    is_hub_id = _HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    return {
        **({"base_model": base} if is_hub_id else {}),
        "license": "other",
        "license_name": "license-of-the-base-model",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "reward-fine-tuning", "lightning-draft"],
        **({"model-index": [{"name": title, "results": [{**result, "metrics": metrics}]}]} if metrics else {}),
    }


def _final(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of the last validation, without the gain over the base model."""
    return {
        name.removeprefix("val/"): v for name, v in scores.items() if name.startswith("val/") and name != "val/gain"
    }


def _score_table(scores: Mapping[str, float]) -> list[str]:
    """Return lines of a table; the reward before training is the reward minus the gain on the same noise."""
    final = _final(scores)
    if not final:
        return []
    gain = scores.get("val/gain")
    before = {"reward": final["reward"] - gain} if gain is not None and "reward" in final else {}
    rows = [
        f"| {_plain(n)} | {f'{before[n]:.4g}' if n in before else ''} | {value:.4g} |" for n, value in final.items()
    ]
    return ["## Scores on held-out prompts\n", "| reward | before training | after |", "|---|--:|--:|", *rows, ""]


def _usage(base: str, pipeline: str, file: str) -> list[str]:
    """Return lines with Python code that loads the file, with diffusers where its pipeline loads LoRA files."""
    if not hasattr(getattr(diffusers, pipeline, None), "load_lora_weights"):
        name = class_for_pipeline(pipeline) or pipeline
        return [
            "\n## Use in Python\n",
            f"```python\nfrom lightning_draft.models import {name}\n",
            f"model = {name}({_literal(base)}, lora=None)",
            f"model.load_lora({_literal(file)})  # this folder or repository\n```",
        ]
    shipped = base in NAMES
    resolve = "from lightning_draft.assets import resolve\n" if shipped else ""
    opener = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    return [
        "\n## Use in diffusers\n",
        f"```python\nfrom diffusers import {pipeline}\n{resolve}",
        f"pipe = {pipeline}.{opener}({f'resolve({_literal(base)})' if shipped else _literal(base)})",
        f'pipe.load_lora_weights(".", weight_name={_literal(file)})  # this folder or repository\n```',
    ]


def _literal(text: str) -> str:
    """Return text as a Python string literal."""
    return json.dumps(text)


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


def upload(folder: Path, repository: str) -> None:
    """Upload a run's files and print the address; if the upload fails, give a warning with the command to repeat it."""
    try:
        print(f"uploaded to {push_to_hub(folder, repository)}", flush=True)
    except Exception as error:  # any error of the connection or the hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"the upload failed ({reason}); to repeat it, write hf upload --private {repository} {folder}", stacklevel=2
        )


def push_to_hub(folder: str | Path, repository: str, endpoint: str | None = None) -> str:
    """Upload LoRA files and their card; a repository that does not exist is created as a private one.

    The token is that of `hf auth login` or of the environment variable `HF_TOKEN`.

    Args:
        folder: Folder of `README.md` and the `.safetensors` files.
        repository: `owner/name`.
        endpoint: Address of the hub; by default that of huggingface_hub.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    api.create_repo(repository, private=True, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=[CARD, "*.safetensors"], commit_message="Add LoRA"
    )
    return str(commit.commit_url)
