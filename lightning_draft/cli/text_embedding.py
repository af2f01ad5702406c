"""Embed the prompts of a run before its other networks are loaded."""

import os
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_draft.cli.messages import as_root_cause
from lightning_draft.data import PromptDataModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.models.prompt_embedding import PromptEmbedding
from lightning_draft.progress import ProgressLine
from lightning_draft.weightless import without_weights


def embed_prompts(config: Any) -> None:
    """Write the embeddings of all prompts of a run to the folder `text.cache` of its model, if it has one.

    Only the text encoders are loaded, on the device on which the run will train.

    Args:
        config: The parsed options of `fit` or `validate`.
    """
    options = config["model"]["init_args"]["model"]
    text = (options.get("init_args") or {}).get("text")
    if text is None or text["cache"] is None:
        return
    parser = ArgumentParser()
    parser.add_subclass_arguments(DiffusionModel, "model")
    with as_root_cause(), without_weights():
        model = parser.instantiate(Namespace(model=options))["model"]  # type: ignore[no-untyped-call]
    if not isinstance(model, PromptEmbedding):
        return
    data = PromptDataModule(**config["data"].as_dict())
    device = _device(config["trainer"]["accelerator"], config["trainer"]["devices"])
    progress = ProgressLine("texts embedded")
    model.precompute([*data.train_prompts, *data.val_prompts], device, progress)
    progress.finish()


def _device(accelerator: object, devices: object) -> torch.device:
    """Return the device of this process; `devices` may name the GPUs of the run, as in `[1]`, `"1,"` and `"0,2"`."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    named = devices.strip("[], ").split(",") if isinstance(devices, str) and "," in devices else devices
    return torch.device("cuda", int(named[rank]) if isinstance(named, list) else rank)
