"""Seeded computations on the CPU neither initialize, seed nor restore the GPUs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from lightning_draft.metrics import kernel_distance
from lightning_draft.models import LoRA
from lightning_draft.samplers import DDIM
from lightning_draft.seeds import scoring, seeded
from lightning_draft.testing import LinearModel
from lightning_draft.trained_steps import trained_steps
from lightning_draft.truncation import LastK
from tests.tiny_pipelines import SMALL_DENOISER

CPU = torch.device("cpu")


def attach() -> torch.Tensor:
    network = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **SMALL_DENOISER,
    )
    LoRA(rank=2, seed=3).attach(network)
    return torch.cat([value.flatten() for value in network.parameters() if value.requires_grad])


def noise(context: Any) -> torch.Tensor:
    with context:
        return torch.randn(3)


@pytest.mark.parametrize(
    "compute",
    [
        attach,
        lambda: noise(seeded(3, CPU)),
        lambda: noise(scoring(CPU)),
        lambda: kernel_distance(torch.arange(12.0).view(6, 2).cos(), torch.arange(8.0).view(4, 2)),
        lambda: torch.tensor([*trained_steps(LastK(2), DDIM(4), LinearModel().schedule, 3).values()]),
    ],
)
def test_gpus_are_not_touched_and_the_random_state_is_restored(
    compute: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("a GPU was initialized or seeded")

    expected = compute()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", touched)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    before = torch.get_rng_state()
    found = compute()
    if compute is not attach:  # the network's own weights are not seeded
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, expected)
