"""The cost of truncations: network calls on the batch, and stored activations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_draft.models.base import Conditioning
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM
from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, ReFL, Truncation
from tests.truncation_by_hand import BATCH, STEPS, THETA, chain_of, linear, noise


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("truncation", "without", "attached"),
    [
        (Full(), 0, STEPS),
        (LastK(1), STEPS - 1, 1),
        (LastK(4), STEPS - 4, 4),
        (LowVariance(2), STEPS - 1, 2),  # one on the batch, one on its copies joined
        (ReFL(m=1), STEPS - 1, 1),
        (RandomK(max_k=1), STEPS - 1, 1),
        (DRTune(k=2, m=1), STEPS - 2, 2),
        (DRTune(k=2, m=0, late_bias=1), STEPS - 2, 2),
        (FlowBPBridge(k=2), STEPS - 2, 2),
        (LeapAlign(), STEPS, 2),
        (FlowBPLagrange(second=0), STEPS, 2),
        (DirectAlign(), STEPS, 1),
        (DirectAlign(low=2, inversion=True), STEPS, 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Truncation) else str(value),
)
def test_number_of_network_calls(truncation: Truncation, without: int, attached: int, checkpointed: bool) -> None:
    """`T` sampling calls; a checkpointed step is called once more in the backward pass."""
    model = linear()
    latents = truncation(chain_of(model, recompute=Recompute(steps=checkpointed)), noise())
    assert (model.calls_without_gradient, model.calls_with_gradient) == (without, attached)
    latents.sum().backward()
    assert (model.calls_without_gradient, model.calls_with_gradient) == (without, attached * (1 + checkpointed))


def test_low_variance_needs_one_forward_pass_per_copy() -> None:
    """Samples through the network: `(T + n) B` forward, of which `(1 + n) B` with gradient."""
    sizes: list[tuple[bool, int]] = []

    class Counting(LinearModel):
        def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
            sizes.append((torch.is_grad_enabled(), len(x)))
            return super().forward(x, t, conditioning)

    LowVariance(3)(chain_of(Counting(THETA, shape=(2, 3))), noise())
    assert sum(size for _, size in sizes) == (STEPS + 3) * BATCH
    assert sum(size for attached, size in sizes if attached) == (1 + 3) * BATCH


def saved_tensors(make: Callable[[], Tensor]) -> int:
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return count


@pytest.mark.parametrize("truncation", [LastK(1), LastK(3), LowVariance(2), ReFL(m=1)], ids=lambda t: type(t).__name__)
def test_steps_without_gradient_store_no_activations(truncation: Truncation) -> None:
    """The saved activations do not grow with the length of the chain."""
    counts = {
        steps: saved_tensors(lambda: truncation(chain_of(linear(), DDIM(steps)), noise()))  # noqa: B023
        for steps in (4, 40)
    }
    assert counts[4] == counts[40] > 0


def test_untrained_step_stores_no_network_activations() -> None:
    """DRTune with one trained step: for other steps, only values for the linear path are saved."""
    model = linear()
    inside = 0
    forward = model.forward

    def counted(x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        nonlocal inside
        saved: list[Tensor] = []
        inside += saved_tensors(lambda: saved.append(forward(x, t, conditioning)) or saved[0])
        return saved[0]

    model.forward = counted  # type: ignore[method-assign]
    DRTune(k=1, m=1)(chain_of(model), noise())
    one = inside
    DRTune(k=3, m=1)(chain_of(model), noise())
    assert inside - one == 3 * one > 0
