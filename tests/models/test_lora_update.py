"""The arithmetic of low-rank updates against dense matrices."""

import pytest
import torch

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.lora_update import Update, add, truncate


def random(rank: int, seed: int, scale: float = 1.0, conv: bool = False) -> Update:
    """An update of a linear layer `(7, 9)`, or of a convolution `(7, 3, 3, 3)`."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, *((3, 3, 3) if conv else (9,)), generator=generator)
    b = torch.randn(7, rank, *((1, 1) if conv else ()), generator=generator)
    return Update(a, b, scale)


@pytest.mark.parametrize("conv", [False, True])
def test_sum_equals_the_sum_of_dense_updates(conv: bool) -> None:
    """Not the product of the sums of the factors."""
    updates = [random(2, 0, 0.7, conv), random(3, 1, -1.5, conv)]
    total = add(updates)
    dense = sum(update.dense() for update in updates)
    assert total.rank == 5
    torch.testing.assert_close(total.dense().float(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv", [False, True])
def test_truncation_is_the_closest_update_of_its_rank(conv: bool) -> None:
    """By the Eckart-Young theorem its distance is the root of the sum of the dropped singular values' squares."""
    update = random(5, 2, 0.5, conv)
    values = torch.linalg.svdvals(update.dense().double().flatten(1))
    for rank in (1, 3):
        kept, distance = truncate(update, rank)
        assert kept.rank == rank
        assert kept.a.shape[1:] == update.a.shape[1:]
        assert distance == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-6)
        assert float((kept.dense() - update.dense()).norm()) == pytest.approx(distance, rel=1e-4)


def test_sufficient_rank_keeps_the_update() -> None:
    update = random(3, 3, 2.0)
    kept, distance = truncate(update, 8)
    assert (kept.rank, distance) == (8, 0.0)
    torch.testing.assert_close(kept.dense(), update.dense(), rtol=1e-5, atol=1e-5)


def test_the_norm_is_that_of_the_dense_update() -> None:
    for update in (random(4, 4, -0.3), random(4, 5, 1.2, conv=True)):
        assert update.norm() == pytest.approx(float(update.dense().norm()), rel=1e-5)


def test_alpha_is_scale_times_rank_and_factors_multiply_the_update() -> None:
    update = random(4, 6, 0.5)
    assert update.alpha == 2.0
    torch.testing.assert_close(update.times(-3.0).dense(), -3.0 * update.dense())


def test_updates_of_different_layers_cannot_be_added() -> None:
    with pytest.raises(ConfigurationError, match="different shapes cannot be added"):
        add([random(2, 0), random(2, 0, conv=True)])


def test_dense_update_of_half_precision_factors_is_computed_in_float32() -> None:
    update = random(4, 7, 0.5)
    half = Update(update.a.half(), update.b.bfloat16(), 0.5)
    torch.testing.assert_close(half.dense(), 0.5 * half.b.float() @ half.a.float())
    assert random(2, 8).times(2.0).dense().dtype == torch.float32
