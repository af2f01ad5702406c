import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_draft.callbacks import RandomState
from lightning_draft.callbacks.common import observing
from lightning_draft.callbacks.random_state import get_random_state, set_random_state


def random_numbers():
    """Return one number from each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1), float(np.random.randn())


class RandomTraining(L.LightningModule):
    """Uses numbers from the global generators in training, with data in random order."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.tolist(), random_numbers()))
        return self.weight * torch.rand(())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return DataLoader(torch.arange(6), batch_size=2, shuffle=True)


def test_resumed_run_uses_the_random_numbers_of_the_uninterrupted_run(make_trainer, tmp_path):
    """The run is resumed between two epochs of three batches each."""
    L.seed_everything(1, verbose=False)
    whole = RandomTraining()
    make_trainer(RandomState(), max_steps=-1, max_epochs=3).fit(whole)

    L.seed_everything(1, verbose=False)
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_epochs=1, save_on_train_epoch_end=True)
    make_trainer(RandomState(), saver, max_steps=-1, max_epochs=1, enable_checkpointing=True).fit(RandomTraining())

    L.seed_everything(77, verbose=False)
    resumed = RandomTraining()
    make_trainer(RandomState(), saver, max_steps=-1, max_epochs=3, enable_checkpointing=True).fit(
        resumed, ckpt_path=tmp_path / "half.ckpt"
    )
    assert resumed.seen == whole.seen[3:]
    assert torch.equal(resumed.weight, whole.weight)


def test_resumed_epoch_uses_the_same_random_numbers(make_trainer, tmp_path):
    """The data loader must restore its order itself; the random numbers of the steps are the same."""
    L.seed_everything(1, verbose=False)
    whole = RandomTraining()
    make_trainer(RandomState(), max_steps=3).fit(whole)

    L.seed_everything(1, verbose=False)
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2)
    make_trainer(RandomState(), saver, max_steps=2, enable_checkpointing=True).fit(RandomTraining())

    L.seed_everything(77, verbose=False)
    resumed = RandomTraining()
    make_trainer(RandomState(), saver, max_steps=3, enable_checkpointing=True).fit(
        resumed, ckpt_path=tmp_path / "half.ckpt"
    )
    assert [numbers for _, numbers in resumed.seen] == [numbers for _, numbers in whole.seen[2:]]


def test_another_number_of_processes_gives_a_warning(make_trainer):
    callback = RandomState()
    callback.load_state_dict({"processes": [get_random_state()] * 2, "between_epochs": False})
    with pytest.warns(UserWarning, match="2 processes and there are 1 now"):
        make_trainer(callback, max_steps=1).fit(RandomTraining())


def test_states_can_be_loaded_with_weights_only(tmp_path):
    random.gauss(0, 1)
    np.random.randn()
    torch.save(get_random_state(), tmp_path / "state.pt")
    expected = random_numbers()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert random_numbers() == expected


class Mixed(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(1, 1), nn.Sequential(nn.Dropout(0.5))])
        self.parts[0].eval()


def test_observing_restores_modes_and_random_states_on_error():
    module = Mixed()
    modes = [part.training for part in module.modules()]
    state = get_random_state()
    expected = random_numbers()
    set_random_state(state)

    def look():
        with observing(module):
            assert not any(part.training for part in module.modules())
            assert not torch.is_grad_enabled()
            random_numbers()
            raise RuntimeError("broken reward")

    with pytest.raises(RuntimeError, match="broken reward"):
        look()
    assert random_numbers() == expected
    assert [part.training for part in module.modules()] == modes
    assert torch.is_grad_enabled()
