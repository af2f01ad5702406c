"""Optimizer, schedule and evaluation rewards of DRaFT, and settings that are rejected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM
from tests.tiny_draft import linear, make, trainer_of
from tests.tiny_runs import data


def test_optimizer_and_schedule_receive_only_the_adapters(tiny_sd: Path, tmp_path: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module = make(tiny_sd, lr_scheduler=scheduler)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(module, data())
    (group,) = trainer.optimizers[0].param_groups
    assert {id(value) for value in group["params"]} == {id(value) for value in module.trainable_parameters().values()}
    assert group["lr"] == pytest.approx(1e-2 * 0.5**3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be at least 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        (
            {"checkpointing": "steps"},
            "checkpointing='steps' is not a valid choice; write one of auto, none, step, block, both",
        ),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**options)


@pytest.mark.parametrize("name", ["training", "type", "parameters"])
def test_evaluation_reward_can_have_the_name_of_a_module_attribute(name: str, tiny_sd: Path) -> None:
    module = DraftModule(
        StableDiffusion(str(tiny_sd), guidance=Guidance(1.0)), Brightness(), DDIM(2), eval_rewards={name: Brightness()}
    )
    scores = module.score(torch.rand(2, 3, 16, 16), ["a cat", "a dog"])
    torch.testing.assert_close(scores[name], scores["reward"])


class Listed(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return list(images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    "options", [{"reward": Listed()}, {"eval_rewards": {"odd": Listed()}}], ids=["trained", "eval"]
)
def test_validation_scores_must_have_one_value_per_image(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^Listed.forward returned a list for 2 images; return a tensor of"):
        linear(**options).score(torch.rand(2, 3, 4, 4), ["a cat", "a dog"])


@pytest.mark.parametrize("name", ["a.b", "reward", ""])
def test_evaluation_reward_with_the_name_of_a_log_key_is_rejected(name: str, tiny_sd: Path) -> None:
    with pytest.raises(ConfigurationError, match="reward"):
        DraftModule(StableDiffusion(str(tiny_sd)), Brightness(), eval_rewards={name: Brightness()})
