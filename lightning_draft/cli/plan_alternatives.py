"""Options that may lower the peak memory of a training step, without those that would change nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_draft.cli.messages import flatten
from lightning_draft.methods.direct import DirectModule
from lightning_draft.models.pipeline import PipelineModel

ALTERNATIVES = (
    "--model.checkpointing step",
    "--model.checkpointing block",
    "--model.checkpointing both",
    "--model.micro_batch_size 1",
    "--model.timesteps_per_minibatch 1",
    "--model.model.memory.checkpoint_decoder true",
    "--model.model.memory.checkpoint_decoder true --model.model.memory.decode_chunk 1",
    "--model.model.memory.checkpoint_decoder block --model.model.memory.decode_chunk 1",
    "--model.model.text.cache embeddings",
    "--model.model.dtype bfloat16",
    "--model.model.quantization torchao-int8",
    "--model.model.quantization torchao-int8 --model.checkpointing block",
    "--model.model.quantization bitsandbytes-nf4",
)
"""Options that may lower the peak. An 8-bit optimizer is none of them, because a plan with it needs its package."""

_MODES = {(False, False): "none", (True, False): "step", (False, True): "block", (True, True): "both"}


def effective_options(config: Any, module: Any, batch_size: int) -> dict[str, str]:
    """Return the options of a run by name, as text; defaults that depend on others have the value that they get.

    Args:
        config: The configuration of `fit`.
        module: The method.
        batch_size: Number of prompts in a batch.
    """
    options = {name: str(value).lower() for name, value in flatten(config.as_dict()).items()}
    recompute, model = module.recompute, module.model
    options["model.checkpointing"] = _MODES[recompute.steps, recompute.blocks]
    if isinstance(model, PipelineModel) and model.text.cache:
        options["model.model.text.cache"] = "embeddings"  # another folder would not help
    if not isinstance(module, DirectModule):
        return options
    if batch_size == 1:
        options["model.micro_batch_size"] = "1"
    if isinstance(model, PipelineModel) and model.vae is not None:
        images = min(batch_size, module.micro_batch_size or batch_size)
        chunk = min(images, model.memory.chunk(model.image_size))
        options["model.model.memory.decode_chunk"] = str(chunk)
        if model.memory.checkpoint_decoder != "block":
            recomputes = model.memory.recomputes(-(-images // chunk))
            options["model.model.memory.checkpoint_decoder"] = str(recomputes).lower()
    return options


def distinct(alternatives: Sequence[str], options: Mapping[str, str]) -> Iterator[str]:
    """Yield the alternatives that change an option and differ from those before.

    Args:
        alternatives: Options as written on the command line, such as `--model.checkpointing step`.
        options: From `effective_options`.
    """
    seen: list[Mapping[str, str]] = [options]
    for alternative in alternatives:
        words = alternative.split()
        names = (word.removeprefix("--") for word in words[::2])
        changed = {**options, **dict(zip(names, words[1::2], strict=True))}
        if changed not in seen:
            seen.append(changed)
            yield alternative
