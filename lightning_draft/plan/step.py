"""Run one training step without weights, and count its memory and floating-point operations."""

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.base import DiffusionModel
from lightning_draft.models.prompt_embedding import PromptEmbedding
from lightning_draft.models.quantization import stored_tensors
from lightning_draft.plan.replay import replayed
from lightning_draft.plan.tracker import OTHER, Tracker
from lightning_draft.weightless import is_without_weights

TRAINED = "trained"
"""Name of the trained weights, which are counted apart from the networks that they belong to."""

_FEW = 16
"""Number of modules up to which a block is run, which takes no longer than to recognize its call."""


@dataclass(frozen=True)
class EmbeddingPlan:
    """Peak memory while a model with `text.cache` embeds its prompts, before its other networks are loaded.

    Args:
        weights: Bytes of the text encoders' parameters and buffers, by text encoder.
        live: Largest number of bytes of other tensors that exist at the same time.
    """

    weights: Mapping[str, int]
    live: int

    @property
    def peak(self) -> int:
        """Peak bytes."""
        return sum(self.weights.values()) + self.live


@dataclass(frozen=True)
class StepPlan:
    """Peak memory and cost of one optimizer step on one device.

    Args:
        weights: Bytes of parameters and buffers, by part.
        optimizer: Bytes of the optimizer's state.
        live: Largest number of bytes of tensors that exist at the same time, gradients included, besides the weights
            and the optimizer's state.
        live_by_part: `live` by the part whose operations created the tensors; `other` is latents, the sampler, the
            loss and the backward pass.
        flops: Floating-point operations by part, forward, recomputation and backward; the backward pass is in `other`.
        calls: Number of forward calls of each part, recomputation included.
        embedding: The embedding of the prompts before the first step, with `text.cache`.
    """

    weights: Mapping[str, int]
    optimizer: int
    live: int
    live_by_part: Mapping[str, int]
    flops: Mapping[str, int]
    calls: Mapping[str, int]
    embedding: EmbeddingPlan | None = None

    @property
    def peak(self) -> int:
        """Peak bytes of the run, in a step or before the first one."""
        return max(self.step_peak, 0 if self.embedding is None else self.embedding.peak)

    @property
    def step_peak(self) -> int:
        """Peak bytes of a step: weights, the optimizer's state, and all other tensors at the peak."""
        return sum(self.weights.values()) + self.optimizer + self.live

    @property
    def total_flops(self) -> int:
        """Floating-point operations of the step."""
        return sum(self.flops.values())

    def with_calls(self, part: str, number: int, flops: int) -> "StepPlan":
        """Return the plan with more forward calls of a part, after which no activations are stored.

        Args:
            part: Name of the part.
            number: Number of calls.
            flops: Floating-point operations of one call.
        """
        calls = {**self.calls, part: self.calls.get(part, 0) + number}
        return replace(self, calls=calls, flops={**self.flops, part: self.flops.get(part, 0) + number * flops})

    def extrapolate(self, longer: "StepPlan", factor: float) -> "StepPlan":
        """Return `self + factor (longer - self)`, for a chain whose peak and cost are affine in its length.

        Args:
            longer: The plan of a longer chain.
            factor: 1 gives `longer`.
        """

        def mix(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
            return {name: round(a.get(name, 0) + factor * (b.get(name, 0) - a.get(name, 0))) for name in {**a, **b}}

        return StepPlan(
            longer.weights,
            longer.optimizer,
            round(self.live + factor * (longer.live - self.live)),
            mix(self.live_by_part, longer.live_by_part),
            mix(self.flops, longer.flops),
            mix(self.calls, longer.calls),
            longer.embedding,
        )


def plan_step(module: RewardModule, prompts: list[str], trainer_options: Mapping[str, Any]) -> StepPlan:
    """Count the memory and the floating-point operations of one optimizer step.

    The Trainer runs the step as in training, on tensors that have a shape and no values. `module` must have been built
    within `weightless.without_weights`, which must still be active. A module with weights also works; the step is then
    computed with their values.

    Args:
        module: The method with its model and reward.
        prompts: One batch.
        trainer_options: `precision`, `accumulate_grad_batches` and `gradient_clip_val` of the Trainer.

    Raises:
        ConfigurationError: The reward reads pixel values, as JPEG encoders and services do.
    """
    embedding = _embedding_plan(module.model, prompts)
    parts = model_parts(module)
    weights = _weights(module, parts)
    module.checks_first_step = False
    if isinstance(module, DraftModule):
        module.truncation = module.truncation.costliest()
    tracker = Tracker(parts)
    before_optimizer = _BeforeOptimizer(tracker)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[before_optimizer],
        **trainer_options,
    )
    batches = module.training_steps_per_batch(len(prompts)) * trainer.accumulate_grad_batches
    with tracker, _repeated(tracker, module), _no_garbage_collection(), _values_are_missing(module):
        # Lightning would take a list of lists as one loader for each list.
        trainer.fit(module, DataLoader([prompts] * batches, batch_size=None))  # type: ignore[arg-type]
    state = sum(map(_nbytes, (each.state for each in trainer.optimizers)))
    live, by_part = before_optimizer.peak
    if tracker.peak > live + state:  # in the optimizer's step
        live, by_part = tracker.peak - state, tracker.at_peak
    return StepPlan(weights, state, live, {**by_part}, {**tracker.flops}, {**tracker.calls}, embedding)


def _embedding_plan(model: DiffusionModel, prompts: list[str]) -> EmbeddingPlan | None:
    """Embed the prompts of a model with `text.cache`, as in a run whose folder is empty; `None` for other models.

    Each prompt is embedded separately, so that the longest one has the peak.
    """
    if not isinstance(model, PromptEmbedding) or model.text.cache is None:
        return None
    with model.loaded_text_encoders() as encoders:
        weights = _weights(model, encoders)
        with Tracker() as tracker:
            model.precompute([max(prompts, key=len)])
        model.precompute(prompts)
    return EmbeddingPlan({name: weights[name] for name in encoders if name in weights}, tracker.peak)


@contextmanager
def _values_are_missing(module: RewardModule) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "numpy() is not supported for tensor subclasses" not in str(error):
            raise
        raise ConfigurationError(
            f"the reward {type(module.reward).__name__} reads pixel values, which a plan does not have; plan with "
            "another reward, such as --model.reward Brightness"
        ) from error


def model_parts(module: RewardModule) -> dict[str, nn.Module]:
    """Return the networks of a run by the name of their part; a model that is its own denoiser is one part."""
    model, parts = module.model, {"reward": module.reward, "denoiser": module.model.denoiser}
    if model.denoiser is not model:
        parts |= {
            "autoencoder" if name == "vae" else name.replace("_", " "): child
            for name, child in model.named_children()
            if child is not model.denoiser
        }
    return parts


def _repeated(tracker: Tracker, module: RewardModule) -> AbstractContextManager[None]:
    """Return the context in which the networks of a module without weights run once for each kind of call."""
    return replayed(tracker, _networks(module)) if is_without_weights() else nullcontext()


def _networks(module: RewardModule) -> Iterator[nn.Module]:
    """Yield the denoiser, the decoder, and blocks in lists."""
    yield module.model.denoiser
    yield from model_parts(module).get("autoencoder", nn.Module()).children()
    for block in _blocks(module):
        if not any(_blocks(block)):
            yield block


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of lists that are not small; those of a U-Net's levels contain others."""
    for child in network.modules():
        if isinstance(child, nn.ModuleList):
            yield from (each for each in child if each is not None and len([*each.modules()]) > _FEW)


def call_flops(module: RewardModule, prompts: list[str]) -> int:
    """Return the floating-point operations of the denoiser in one step without gradient."""
    (time, _), *_ = module.sampler.grid(module.model.schedule)
    with torch.no_grad(), Tracker(model_parts(module)) as tracker, _repeated(tracker, module):
        conditioning = module.model.encode(prompts)
        before = tracker.flops["denoiser"]
        module.model(module.model.noise(len(prompts)), time, conditioning)
    return tracker.flops["denoiser"] - before


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within this context reference cycles are not collected, so that the count does not depend on their collection."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _BeforeOptimizer(Callback):
    """Record the peak before the optimizer's first step, which creates the optimizer's state."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.peak: tuple[int, Mapping[str, int]] = (0, {})

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Record the peak so far."""
        self.peak = (self.tracker.peak, self.tracker.at_peak)


def _weights(module: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the bytes of parameters and buffers by part; `trained` is the parameters with a gradient."""
    trained = {id(each) for each in module.parameters() if each.requires_grad}
    counted: set[int] = set()
    sizes: Counter[str] = Counter()
    for name, part in (*parts.items(), (OTHER, module)):
        for value in (*part.parameters(), *part.buffers()):
            if id(value) not in counted:
                counted.add(id(value))
                sizes[TRAINED if id(value) in trained else name] += sum(each.nbytes for each in stored_tensors(value))
    return {name: size for name, size in sizes.items() if size}


def _nbytes(state: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor)]
    return sum(stored.nbytes for tensor in tensors for stored in stored_tensors(tensor))
