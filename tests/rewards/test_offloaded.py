"""A reward on the CPU: where its weights are before, during and after scoring."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from lightning_draft.callbacks.lora_header import describe
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.rewards import (
    Brightness,
    LatentNetwork,
    Offloaded,
    Reward,
    Samples,
    WeightedReward,
    WeightedSum,
    ZScoreSum,
)
from lightning_draft.rewards.usage import total_usage
from lightning_draft.samplers import DDIM
from lightning_draft.score_table import ScoreTable
from lightning_draft.testing import LinearModel, LinearReward
from tests.tiny_draft import trainer_of
from tests.tiny_runs import data


class Moves(Reward):
    """Records the devices to which it is moved, and when it scores; the last score is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def to(self, device: Any) -> Self:  # type: ignore[override]
        self.events.append(str(device))
        return self

    def __call__(self, samples: Any, prompts: Sequence[str]) -> Tensor:
        self.events.append("scores")
        if prompts == ["error"]:
            raise RuntimeError
        return torch.zeros(len(prompts))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError


def test_weights_are_on_the_device_of_the_samples_only_while_they_are_scored() -> None:
    reward = Moves()
    samples = Samples(None, torch.empty(1, 3, 2, 2, device="meta"))
    Offloaded(reward).forward(samples, ["a cat"])
    assert reward.events == ["meta", "scores", "cpu"]
    with pytest.raises(RuntimeError):
        Offloaded(reward).forward(samples, ["error"])
    assert reward.events == ["meta", "scores", "cpu"] * 2


def test_moving_the_module_does_not_move_the_reward() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    parent = nn.ModuleDict({"reward": Offloaded(LatentNetwork(network)), "other": nn.Linear(1, 1)}).to("meta")
    assert {value.device.type for value in parent.parameters()} == {"meta"}
    assert {value.device.type for value in network.parameters()} == {"cpu"}
    latents = torch.rand(2, 1, 2, 2)
    assert torch.equal(parent["reward"](Samples(latents), ["a", "b"]), network(latents).squeeze(1))


def test_validation_scores_are_those_of_the_reward_itself(tmp_path: Path) -> None:
    rewards = {"plain": LinearReward(2.0), "offloaded": Offloaded(LinearReward(2.0))}
    module = DraftModule(LinearModel(), LinearReward(), DDIM(2), eval_rewards=rewards)
    (metrics,) = trainer_of(tmp_path, limit_val_batches=1).validate(module, data(), verbose=False)
    assert metrics["val/offloaded"] == metrics["val/plain"] != 0


class Counted(LinearReward):
    """Also counts its calls, and depends on a file."""

    calls = 0

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        return super().forward(images, prompts)

    def usage(self) -> dict[str, float]:
        return {"requests": self.calls}

    def data_version(self) -> str:
        return f"{self.weight}"


def test_the_reward_inside_is_described_and_its_usage_is_counted(tmp_path: Path) -> None:
    """Also inside a sum; else `scores.csv` would continue with the scores of another reward."""
    inside = Counted(2.0)
    outside = WeightedSum({"a": WeightedReward(Offloaded(inside)), "b": WeightedReward(inside)})
    outside(torch.rand(2, 3, 2, 2), ["a", "b"])
    assert total_usage([outside]) == {"requests": 2}
    assert describe(Offloaded(LinearReward(2.0))) == "Offloaded(reward=LinearReward(weight=2.0, bias=0.0))"
    ScoreTable(tmp_path, tmp_path, {"r": Offloaded(Counted(2.0))}).replace([])
    settings = json.loads((tmp_path / "scoring.json").read_text())
    assert [part["class"] for part in settings["rewards"]["r"]] == ["Offloaded", "Counted"]
    assert settings["rewards"]["r"][1]["data"] == "2.0"
    with pytest.raises(ConfigurationError, match="contains scores of other rewards"):
        ScoreTable(tmp_path, tmp_path, {"r": Offloaded(Counted(3.0))})


def test_components_are_those_of_the_reward_inside() -> None:
    reward = WeightedSum({"a": WeightedReward(LinearReward(2.0)), "b": WeightedReward(LinearReward(3.0), -1.0)})
    images = torch.rand(2, 3, 2, 2)
    expected, found = reward.breakdown(images, ["a", "b"]), Offloaded(reward).breakdown(images, ["a", "b"])
    assert torch.equal(found[0], expected[0])
    assert {name: value.tolist() for name, value in found[1].items()} == {
        name: value.tolist() for name, value in expected[1].items()
    }


def test_where_it_cannot_be_used_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="reward=ZScoreSum has running statistics, which Offloaded does not"):
        Offloaded(ZScoreSum({"bright": WeightedReward(Brightness())}))
    with pytest.raises(ConfigurationError, match="the reward Offloaded is not differentiable"):
        DraftModule(LinearModel(), Offloaded(Brightness()), DDIM(2)).check_configuration()
