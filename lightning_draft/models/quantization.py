"""Quantized frozen networks, loaded by the quantizers of diffusers and transformers.

References:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314 (NF4).
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_draft.arguments import one_of
from lightning_draft.errors import ConfigurationError

Quantization = Literal["torchao-int8", "bitsandbytes-nf4"]
"""Library and format of quantized weights."""


def check_quantization(kind: str, trainable: str | list[str], without_weights: bool) -> None:
    """Check that a pipeline can be quantized here.

    Args:
        kind: The option `quantization`.
        trainable: The option `trainable`.
        without_weights: Whether no weight is loaded, so that neither the library nor a GPU is needed.

    Raises:
        ConfigurationError: The weights are trained, the kind is unknown, or the library or a GPU is missing.
    """
    one_of("quantization", kind, get_args(Quantization))
    if trainable != "lora":
        raise ConfigurationError(
            f"quantization={kind!r} is for frozen weights, and trainable={trainable!r} trains them; write trainable: "
            "lora, or leave quantization out"
        )
    library = kind.partition("-")[0]
    if without_weights:
        return
    if find_spec(library) is None:
        raise ConfigurationError(
            f"quantization={kind!r} needs the package {library}; install it with pip install "
            f"'lightning-draft[quantization]', or leave quantization out"
        )
    if library == "bitsandbytes" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"quantization={kind!r} needs a GPU, and torch finds none; write quantization: torchao-int8, which works "
            "on a CPU, or leave quantization out"
        )


def quantization_config(kind: Quantization, family: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    """Return diffusers' configuration that quantizes components of a pipeline while they are loaded.

    Args:
        kind: Library and format.
        family: The family of the pipeline.
        names: Components to load, of which the denoiser and the text encoders are quantized.
        dtype: Precision of the computations with `bitsandbytes`.
    """
    from diffusers import PipelineQuantizationConfig

    chosen = [name for name in (family.denoiser, *family.text_encoders) if name in names]
    libraries = {name: "diffusers" if name == family.denoiser else "transformers" for name in chosen}
    mapping = {name: _CONFIGS[kind](importlib.import_module(library), dtype) for name, library in libraries.items()}
    return PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None


@contextmanager
def loading_quantized(kind: Quantization | None) -> Iterator[None]:
    """Within this context, bitsandbytes loads onto this process's GPU."""
    rank, on_gpu = int(os.environ.get("LOCAL_RANK", "0")), kind == "bitsandbytes-nf4" and torch.cuda.is_available()
    with torch.cuda.device(rank) if on_gpu else nullcontext():
        yield


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a weight consists of: for a quantized one integers and scales, else itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state = getattr(tensor, "quant_state", None)  # of bitsandbytes
    return [tensor] if state is None else [tensor.detach(), state.absmax, *_nested(state)]


def replace_linear_layers(network: nn.Module, kind: Quantization) -> None:
    """Replace the linear layers of a network without weights by layers that take the same memory as quantized ones."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, _LAYERS[kind](layer))


class _QuantizedLinear(nn.Linear):
    """A linear layer whose subclasses store the weight in another format.

    Args:
        layer: The layer before quantization.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias


class _Int8Linear(_QuantizedLinear):
    """A linear layer with the memory of torchao's int8 weights; the backward pass needs the converted weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = layer.weight
        self.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(weight.new_zeros(len(weight), 1, dtype=torch.float32), requires_grad=False)
        self.zero_point = nn.Parameter(weight.new_zeros(len(weight), 1, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(x W^T) s + b`."""
        product = torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t().to(x.dtype))
        output = product * self.scale.to(x.dtype).flatten()
        output = output.reshape(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            output += self.bias
        return output


class _NF4Linear(_QuantizedLinear):
    """A linear layer with the memory of bitsandbytes' NF4 weights, which the backward pass dequantizes again."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        count = layer.weight.numel()
        self.weight = nn.Parameter(layer.weight.new_zeros((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        absmax = layer.weight.new_zeros(-(-count // _NF4_BLOCK), dtype=torch.float32)
        self.absmax = nn.Parameter(absmax, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x W^T + b`."""
        output: Tensor = _NF4Product.apply(x, self.weight, self.bias, self.out_features)  # type: ignore[no-untyped-call]
        return output


class _NF4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
        ctx.packed, ctx.shape = packed, (width, x.shape[-1])
        return nn.functional.linear(x, packed.new_zeros(ctx.shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.packed.new_zeros(ctx.shape, dtype=gradient.dtype), None, None, None


_NF4_BLOCK = 64
_LAYERS: dict[Quantization, Callable[[nn.Linear], nn.Module]] = {
    "torchao-int8": _Int8Linear,
    "bitsandbytes-nf4": _NF4Linear,
}


def _int8_config(library: Any, dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[])


def _nf4_config(library: Any, dtype: torch.dtype) -> Any:
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[]
    )


_CONFIGS: dict[Quantization, Callable[[Any, torch.dtype], Any]] = {
    "torchao-int8": _int8_config,
    "bitsandbytes-nf4": _nf4_config,
}


def _nested(state: Any) -> list[Tensor]:
    inner = getattr(state, "state2", None)
    return [] if inner is None else [inner.absmax]
