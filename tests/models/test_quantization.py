"""Quantized frozen weights: what is rejected, what a plan counts, and with torchao real predictions and gradients."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.models.flux import Flux
from lightning_draft.models.quantization import Quantization, replace_linear_layers, stored_tensors
from lightning_draft.plan import Tracker, plan_step
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import FlowEuler
from lightning_draft.truncation import LastK
from lightning_draft.weightless import without_weights
from tests.tiny_families import flux

INT8: Quantization = "torchao-int8"
NF4: Quantization = "bitsandbytes-nf4"
SIDE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("options", "installed", "message"),
    [
        ({"quantization": "int8"}, True, "quantization='int8' is not a valid choice; write one of torchao-int8"),
        ({"quantization": INT8, "trainable": "full"}, True, "is for frozen weights, and trainable='full' trains them"),
        ({"quantization": INT8, "trainable": ["to_q"]}, True, "is for frozen weights"),
        ({"quantization": INT8}, False, "needs the package torchao; install it with pip install 'lightning-draft"),
        ({"quantization": NF4}, True, "needs a GPU, and torch finds none; write quantization: torchao-int8"),
    ],
)
def test_quantization_that_cannot_work_is_rejected(
    options: dict[str, Any], installed: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("torch") if installed else None
    monkeypatch.setattr("lightning_draft.models.quantization.find_spec", lambda _: spec)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=message):
        StableDiffusion("emoji64", **options)


def test_single_files_are_rejected_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with without_weights(), pytest.raises(ConfigurationError, match="needs a pipeline folder or a hub id, and .* is a"):
        StableDiffusion(str(tmp_path / "model.safetensors"), quantization=INT8)


def size(network: nn.Module) -> int:
    return sum(tensor.nbytes for value in network.parameters() for tensor in stored_tensors(value))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (INT8, lambda out, width: out * width + 4 * out + out),
        (NF4, lambda out, width: -(-out * width // 2) + 4 * -(-out * width // 64)),
    ],
)
def test_plan_counts_quantized_bytes(tiny_sd: Path, kind: Quantization, stored: Any) -> None:
    """Int8 has a scale in float32 and a zero point for each row, NF4 a scale in float32 for 64 values."""
    with without_weights():
        full, quantized = (StableDiffusion(str(tiny_sd), lora=None, quantization=each) for each in (None, kind))
    for name in ("unet", "text_encoder"):
        layers = [each for each in getattr(full, name).modules() if type(each) is nn.Linear]
        saved = sum(each.weight.nbytes - stored(each.out_features, each.in_features) for each in layers)
        assert size(getattr(quantized, name)) == size(getattr(full, name)) - saved
    assert size(quantized.vae) == size(full.vae)


@pytest.mark.parametrize(("kind", "copies"), [(INT8, 8), (NF4, 0)])
def test_only_int8_layers_store_converted_weights_for_the_backward_pass(kind: Quantization, copies: int) -> None:
    with without_weights():
        network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        replace_linear_layers(network, kind)
        x = torch.zeros(1, 64, requires_grad=True)
        with Tracker() as live:
            output = network(x)
            assert live.now // (4 * 64 * 64) == copies
            torch.autograd.grad(output.sum(), x)


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("quantization") / "flux"
    flux(folder)
    return folder


def opened(folder: Path, quantization: Quantization | None = INT8) -> Flux:
    return Flux(str(folder), dtype="bfloat16", quantization=quantization, lora=LoRA(rank=2, seed=0), **SIDE)


def test_quantized_predictions_are_close_and_train_the_adapters(tiny_flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    models = [opened(tiny_flux, each) for each in (INT8, None)]
    x = models[0].noise(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, exact = (model(x, 0.5, model.encode(["a cat", "a dog"])) for model in models)
    assert 0 < (ours - exact).norm() < 0.03 * exact.norm()
    frozen = [each for value in models[0].parameters() if not value.requires_grad for each in stored_tensors(value)]
    before = [each.clone() for each in frozen]
    module = DraftModule(models[0], ColorTarget(), FlowEuler(2), LastK(1))
    module.loss_and_logs(["a cat"])[0].backward()
    trained = module.trainable_parameters()
    assert all("lora" in name for name in trained)
    assert any(value.grad is not None and value.grad.norm() > 0 for value in trained.values())
    torch.optim.SGD([value for value in trained.values() if value.grad is not None], lr=1.0).step()
    assert all(map(torch.equal, before, frozen))
    models[0].save_lora(tmp_path / "lora.safetensors")
    plain = FluxPipeline.from_pretrained(tiny_flux)
    plain.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert plain.get_list_adapters()


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_plan_of_int8_equals_the_count_of_the_real_step(tiny_flux: Path, checkpointing: Any) -> None:
    def planned() -> Any:
        method = DraftModule(opened(tiny_flux), ColorTarget(), FlowEuler(2), LastK(1), checkpointing=checkpointing)
        return plan_step(method, ["a cat"], {})

    with without_weights():
        without = planned()
    real = planned()
    assert (without.weights, without.live) == (real.weights, real.live)
