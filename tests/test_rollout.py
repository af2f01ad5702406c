"""The rollout buffer."""

import torch

from lightning_draft.methods.rollout import RolloutBuffer


def test_averages_are_weighted_by_the_fractions_of_the_minibatches():
    buffer = RolloutBuffer()
    buffer.averages({"loss": torch.tensor(1.0)}, 0.75, step=3)
    assert buffer.averages({"loss": torch.tensor(5.0)}, 0.25, step=3)["loss"] == 2.0


def test_averages_of_a_new_fit_exclude_an_earlier_fit_at_the_same_step():
    buffer = RolloutBuffer()
    buffer.averages({"loss": torch.tensor(9.0)}, 0.5, step=0)
    buffer.drop_rollout()
    assert buffer.averages({"loss": torch.tensor(1.0)}, 0.5, step=0)["loss"] == 1.0
