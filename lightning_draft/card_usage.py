"""The Python code of a model card, which loads the LoRA with the scale of each sampling step."""

import json
import re

import diffusers

from lightning_draft.assets import NAMES
from lightning_draft.models.families import class_for_pipeline
from lightning_draft.models.scale_schedule import ScaleSchedule


def usage(
    base: str, pipeline: str, file: str, schedule: ScaleSchedule | None = None, opening: str | None = None
) -> list[str]:
    """Return lines of Markdown with code that loads a LoRA file, with diffusers if its pipeline can apply it.

    Args:
        base: The base model.
        pipeline: Class of diffusers that opens it.
        file: Name of the file.
        schedule: Its scale schedule.
        opening: Python expression that opens the base model in diffusers, if its name is not enough.
    """
    loads_lora = hasattr(getattr(diffusers, pipeline, None), "load_lora_weights")
    if not loads_lora or (schedule is not None and not schedule.scales_weights):
        return _with_this_package(base, pipeline, file)
    code = _opening(base, pipeline) if opening is None else opening
    classes = sorted({pipeline, *re.findall(r"(\w+)\.from_(?:single_file|pretrained)\(", opening or "")})
    others = [each for each in classes if not hasattr(diffusers, each)]
    name = "" if schedule is None else ', adapter_name="reward"'
    return [
        "\n## Use in diffusers\n",
        "```python",
        *(["import safetensors.torch"] if "safetensors.torch.load_file(" in code else []),
        f"from diffusers import {', '.join(each for each in classes if each not in others)}",
        *([f"from transformers import {', '.join(others)}"] if others else []),
        *(["from lightning_draft.assets import resolve"] if base in NAMES else []),
        f"\npipe = {code}",
        f'pipe.load_lora_weights(".", weight_name={_literal(file)}{name})  # this folder or repository',
        *([] if schedule is None else _scheduled(pipeline, schedule)),
        "```",
    ]


def _opening(base: str, pipeline: str) -> str:
    if base in NAMES:
        return f"{pipeline}.from_pretrained(resolve({_literal(base)}))"
    return f"{pipeline}.{'from_single_file' if base.endswith('.safetensors') else 'from_pretrained'}({_literal(base)})"


def _with_this_package(base: str, pipeline: str, file: str) -> list[str]:
    name = class_for_pipeline(pipeline) or pipeline
    return [
        "\n## Use in Python\n",
        f"```python\nfrom lightning_draft.models import {name}\n",
        f"model = {name}({_literal(base)}, lora=None)",
        f"model.load_lora({_literal(file)})  # this folder or repository\n```",
    ]


def _scheduled(pipeline: str, schedule: ScaleSchedule) -> list[str]:
    """Return code that sets the scale of the denoiser's adapters before each step; those of text encoders keep 1."""
    components = getattr(diffusers, pipeline)._lora_loadable_modules
    denoiser = _literal(next(name for name in ("unet", "transformer") if name in components))
    return [
        "\n\ndef scale(step, steps):  # of the LoRA; without it, the images differ from those that were scored",
        f"    return {_formula(schedule)}",
        "\n\ndef next_scale(pipe, step, time, tensors):",
        "    steps = pipe.num_timesteps",
        f'    pipe.set_adapters("reward", {{{denoiser}: scale((step + 1) % steps, steps)}})',
        "    return tensors",
        f'\n\npipe.set_adapters("reward", {{{denoiser}: scale(0, 1)}})',
        'image = pipe(prompt="a prompt", callback_on_step_end=next_scale).images[0]',
    ]


def _formula(schedule: ScaleSchedule) -> str:
    """Return Python code of the weight at `step` of `steps`."""
    if schedule.scales is not None:
        return f"{list(schedule.scales)}[step * {len(schedule.scales)} // steps]"
    return f"(step / steps) ** {schedule.power} if step / steps >= {schedule.start} else 0.0"


def _literal(text: str) -> str:
    """Return text as a Python string literal."""
    return json.dumps(text)
