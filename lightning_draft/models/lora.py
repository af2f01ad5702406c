"""Low-rank adapters: `W + (alpha / rank) B A`, with `B = 0` at the start, in float32 for any precision of the base.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_draft.arguments import boolean, integer_at_least, is_finite, one_of
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.scale_schedule import ScaleSchedule
from lightning_draft.seeds import check_seed, seeded

ADAPTER = "default"
DEFAULT_RANK = 8
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: which layers are adapted, and how.

    Args:
        rank: Rank of the update, at least 1; by default 8, or that of `init`.
        alpha: The update is scaled by `alpha / rank`; by default `rank`, a scale of 1.
        target_modules: Layers, by the end of their names; by default the projections of the model's attention.
        seed: Seed of the initial values of `A`; by default torch's global generator is used, and on the
            command line the seed is that of `seed_everything`.
        init: A LoRA file from which training starts; its layers are adapted. With a lower rank than that of the file,
            the closest update of this rank is used, and the relative error is printed. Its updates of text
            encoders are added to their frozen weights, and are written to exported files.
        reference: Base model for gain and KL divergence: the `pretrained` model, or the model with `init`.
        scale_schedule: Scale of the update as a function of the sampling step, in training and in sampling; by default
            that in the header of `init`, else 1 at each step. `{scales: [1]}` replaces that of `init` by 1.
        merge: Whether consecutive steps without gradient use merged weights `W + dW`, rounded to the precision of `W`,
            which is faster. `W` itself does not change. Without effect with a scale schedule.
    """

    rank: int | None = None
    alpha: float | None = None
    target_modules: Sequence[str] | None = None
    seed: int | None = None
    init: str | None = None
    reference: Literal["pretrained", "init"] = "pretrained"
    scale_schedule: ScaleSchedule | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None:
            integer_at_least("lora.rank", self.rank, 1, "write a rank such as 8")
        if self.seed is not None:
            check_seed(self.seed, "lora.seed")
        one_of("lora.reference", self.reference, ("pretrained", "init"))
        if self.init is None and self.reference == "init":
            raise ConfigurationError(
                "lora.reference=init needs lora.init; write lora.init FILE, or leave lora.reference out"
            )
        if self.init is not None and self.target_modules is not None:
            raise ConfigurationError(
                "lora.init adapts the layers of its file; leave lora.target_modules out, or leave lora.init out"
            )
        boolean("lora.merge", self.merge)
        if self.alpha is not None and (not is_finite(self.alpha) or self.alpha <= 0):
            raise ConfigurationError(f"lora.alpha={self.alpha!r} must be positive; leave it out for alpha = rank")
        if isinstance(self.target_modules, str) or (self.target_modules is not None and not self.target_modules):
            raise ConfigurationError(
                f"lora.target_modules={self.target_modules!r} must be a list of layer names, such as [to_q, to_k, to_v]"
            )

    @property
    def scale(self) -> float:
        """The factor `alpha / rank` of `B A`."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank or DEFAULT_RANK)

    def config(self, default: Sequence[str] = ATTENTION) -> LoraConfig:
        """Return the configuration for peft, with the layers of `default` if none are named."""
        rank = self.rank or DEFAULT_RANK
        return LoraConfig(
            r=rank,
            lora_alpha=rank if self.alpha is None else self.alpha,
            target_modules=list(self.target_modules or default),
            init_lora_weights=True,
        )

    def attach(self, network: nn.Module, default: Sequence[str] = ATTENTION) -> None:
        """Add trainable float32 adapters to a network; its output does not change.

        Args:
            network: The denoiser.
            default: Layers to adapt if none are named.

        Raises:
            ConfigurationError: No layer of the network has one of the names.
        """
        device = next(network.parameters()).device
        with nullcontext() if self.seed is None else seeded(self.seed, device):
            self._inject(network, self.config(default))
            # peft casts to the base's dtype, which would round A: initialize it again in float32.
            for layer in layers(network):
                layer.lora_A[ADAPTER].float()
                layer.lora_B[ADAPTER].float()
                layer.reset_lora_parameters(ADAPTER, True)

    def _inject(self, network: Any, config: LoraConfig) -> None:
        try:
            if hasattr(network, "add_adapter"):
                network.add_adapter(config, ADAPTER)
            else:  # some networks of diffusers do not have it
                inject_adapter_in_model(config, network, ADAPTER)
        except ValueError as error:
            wanted = sorted(config.target_modules)
            linear = {name.split(".")[-1] for name, m in network.named_modules() if isinstance(m, nn.Linear)}
            names = sorted(name for name in linear if not name.isdigit())
            raise ConfigurationError(
                f"lora.target_modules={shortened(wanted)} cannot be adapted ({str(error)[:200]}); this network's "
                f"linear layers are to_out.0, {shortened(names, 20)}"
            ) from error


def shortened(names: Sequence[str], count: int = 4) -> str:
    """Return the first names and the number of further ones."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def layers(network: nn.Module) -> list[LoraLayer]:
    """Return the adapted layers of a network."""
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def detach(network: Any) -> None:
    """Replace the adapted layers of a network with the layers that they adapt."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            network.set_submodule(name, module.base_layer)
    del network.peft_config
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within this context, adapters are disabled; their `requires_grad` does not change."""
    before = [(layer, layer.disable_adapters) for layer in layers(network)]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in before:
            layer._disable_adapters = value


def check_not_initialized(lora: LoRA | None, trainable: object) -> None:
    """Check that no adapters are to be read for a denoiser whose own weights are trained.

    Raises:
        ConfigurationError: `lora.init` is given.
    """
    if lora is not None and lora.init is not None:
        raise ConfigurationError(
            f"lora.init={lora.init!r} has no effect with trainable: {trainable}; write trainable: lora"
        )


_CANNOT_MERGE = (
    "lora.merge needs whole floating-point weights, and those of this denoiser are quantized or sharded over "
    "processes; write lora.merge: false"
)


def check_not_merged(lora: LoRA | None) -> None:
    """Raise if adapters are to be merged into weights that are sharded over processes.

    Raises:
        ConfigurationError: `lora.merge` is set.
    """
    if lora is not None and lora.merge:
        raise ConfigurationError(_CANNOT_MERGE)


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Within this context, without gradient, adapted layers have the weight `W + dW`, rounded to the dtype of `W`.

    Disabled adapters are not merged. `W` is put back, not computed from the sum.

    Raises:
        ConfigurationError: The weights are quantized, or sharded over processes.
    """
    before = [(layer, layer.get_base_layer().weight) for layer in layers(network) if not layer.disable_adapters]
    # Sharded and quantized weights of tensor subclasses report a floating-point dtype.
    if any(hasattr(weight, "__tensor_flatten__") or not weight.is_floating_point() for _, weight in before):
        raise ConfigurationError(_CANNOT_MERGE)
    originals = [weight.data for _, weight in before]
    try:
        for layer, weight in before:
            weight.data = (weight.data.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype)
            layer._disable_adapters = True
        yield
    finally:
        for (layer, weight), original in zip(before, originals, strict=True):
            weight.data = original
            layer._disable_adapters = False


def is_disabled(network: nn.Module) -> bool:
    """Return whether the network's adapters are disabled."""
    return all(layer.disable_adapters for layer in layers(network))


@contextmanager
def scaled(network: nn.Module, scale: float) -> Iterator[None]:
    """Within this context, the network's weights are `theta + scale dW`; scales of nested contexts are multiplied."""
    before = [(layer, layer.scaling[ADAPTER]) for layer in layers(network)]
    try:
        for layer, value in before:
            layer.scaling[ADAPTER] = scale * value
        yield
    finally:
        for layer, value in before:
            layer.scaling[ADAPTER] = value


def with_current_scales(block: nn.Module, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function that calls the block with the adapters as they are now, whatever their later scales.

    The backward pass recomputes blocks outside of the contexts in which the forward pass evaluated them.

    Args:
        block: The block.
        run: Calls it; by default the block itself.
    """
    function = block if run is None else run
    before = [(layer, layer.disable_adapters, layer.scaling[ADAPTER]) for layer in layers(block)]

    def call(*inputs: Any, **options: Any) -> Any:
        """Call the function with the adapters as they were, then set them back."""
        now = [(layer, layer.disable_adapters, layer.scaling[ADAPTER]) for layer, _, _ in before]
        try:
            _restore(before)
            return function(*inputs, **options)
        finally:
            _restore(now)

    return call


def _restore(states: Sequence[tuple[LoraLayer, bool, float]]) -> None:
    for layer, is_off, scale in states:
        layer._disable_adapters = is_off
        layer.scaling[ADAPTER] = scale
