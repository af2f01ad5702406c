"""Write single files, and compare the models and the printed code that open them."""

import re
from pathlib import Path

import diffusers
import safetensors.torch
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.cli.summary import lora_lines
from lightning_draft.models import PipelineModel
from lightning_draft.samplers import DDIM, FlowEuler


def written(state: dict[str, Tensor], file: Path) -> str:
    """Write a checkpoint and return its name."""
    save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, file)
    return str(file)


def assert_same_weights(ours: PipelineModel, theirs: PipelineModel) -> None:
    """Bitwise."""
    first, second = ours.state_dict(), theirs.state_dict()
    assert {name: value.dtype for name, value in first.items()} == {name: value.dtype for name, value in second.items()}
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@torch.no_grad()
def image(model: PipelineModel) -> Tensor:
    """An image of two steps, from weights whose addresses are aligned: those in a file round differently."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    sampler = FlowEuler(2) if model.prediction == "flow" else DDIM(2)
    chain = SamplingChain(model, sampler, model.encode(["a red cat"]))
    return model.decode(chain.advance(chain.start(model.noise(1, torch.Generator().manual_seed(0)))).x)


def assert_same_model(ours: PipelineModel, theirs: PipelineModel) -> None:
    """Weights, schedule and image."""
    assert_same_weights(ours, theirs)
    assert (ours.schedule, ours.prediction) == (theirs.schedule, theirs.prediction)
    assert torch.equal(image(ours), image(theirs))


def assert_printed_code_opens(model: PipelineModel, folder: Path) -> None:
    """The printed code opens the networks of a model, without its adapters."""
    lines = [line.strip() for line in lora_lines(model, folder / "lora.safetensors")]
    assert lines[0] == "in diffusers:"
    kinds = re.findall(r"\w+(?=\.from_)", lines[1])
    libraries = {kind: diffusers if hasattr(diffusers, kind) else transformers for kind in kinds}
    names = {"safetensors": safetensors, **{kind: getattr(library, kind) for kind, library in libraries.items()}}
    exec(lines[1], names)
    opened = names["pipe"].components
    for network in model.family.networks:
        if getattr(model.pipeline, network) is None:
            assert opened[network] is None
            continue
        theirs, ours = opened[network].state_dict(), getattr(model.pipeline, network).state_dict()
        values = {key.replace(".base_layer", ""): value for key, value in ours.items() if "lora_" not in key}
        assert theirs.keys() == values.keys()
        assert all(torch.equal(value, values[key]) for key, value in theirs.items())
