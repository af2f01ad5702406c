"""The benchmark of rewards covers all rewards, at their published sizes, in files that they read."""

import inspect
import json
from pathlib import Path

import pytest
import torch

import lightning_draft.rewards as rewards
from benchmarks import random_rewards, reward_cost
from lightning_draft.rewards import (
    HPSv2,
    HumanVotes,
    ImageReward,
    LatentReward,
    Offloaded,
    PairwiseReward,
    Reward,
    VLMJudge,
)
from lightning_draft.rewards.combine import WeightedSum
from lightning_draft.rewards.robust import Augmented, Ensemble, Relative


def test_every_reward_is_measured() -> None:
    classes = [kind for name in rewards.__all__ if inspect.isclass(kind := getattr(rewards, name))]
    others = (WeightedSum, Augmented, Ensemble, Relative, Offloaded, LatentReward, VLMJudge, HumanVotes)
    measurable = {kind for kind in classes if issubclass(kind, Reward) and not issubclass(kind, others)}
    measured = {case.reward for case in reward_cost.cases("http://127.0.0.1:1")}
    assert measured == {kind.__name__ for kind in measurable - {Reward, PairwiseReward}}


def test_parameter_counts_equal_the_published_ones() -> None:
    """Parameters in millions: open_clip's ViT-H-14; BLIP's large vision transformer, text encoder and the head."""
    sizes = [
        sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6
        for shapes in (random_rewards.open_clip_shapes(), random_rewards.image_reward_shapes())
    ]
    assert sizes[0] == pytest.approx(986.11, abs=0.01)
    assert sizes[1] == pytest.approx(303.3 + 138.0 + 0.9, rel=0.02)


def test_benchmark_files_can_be_read_by_the_rewards(tmp_path: Path) -> None:
    words = random_rewards.write_clip_words(tmp_path)
    assert (len(words), words.eos_token_id) == (random_rewards.CLIP_WORDS, random_rewards.CLIP_WORDS - 1)
    small = random_rewards.open_clip_shapes((32, 1), (16, 1), 8, places=(5, 77), patch=8)
    torch.save({"state_dict": random_rewards.random_tensors(small)}, tmp_path / "clip.pt")
    hps = HPSv2(weights=str(tmp_path / "clip.pt"), tokenizer=str(tmp_path))
    small = random_rewards.image_reward_shapes((64, 1), (16, 1), grid=2)
    torch.save(random_rewards.random_tensors(small), tmp_path / "blip.pt")
    config = {
        **random_rewards.tower(16, 1, 2),
        "vocab_size": random_rewards.BERT_WORDS + 2,
        "max_position_embeddings": 512,
    }
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    blip = ImageReward(str(tmp_path / "blip.pt"), tokenizer=random_rewards.write_bert_words(tmp_path))
    for reward in (hps, blip):
        weights, seconds, live = reward_cost.measure(reward, torch.rand(2, 3, 40, 40), repeats=1)
        numbers = sum(parameter.numel() for parameter in reward.parameters())
        assert 4 * numbers <= weights * 2**20 < 4 * numbers + 8000  # buffers hold numbers of places
        assert seconds > 0
        assert live > 0


def test_measured_memory_equals_the_known_memory_of_brightness() -> None:
    """Brightness stores a few numbers per image and the gradient, which is as large as the image."""
    weights, seconds, live = reward_cost.measure(rewards.Brightness(), torch.rand(4, 3, 64, 64), repeats=2)
    assert weights == 0
    assert 3 * 64 * 64 * 4 <= live * 2**20 < 2.5 * 3 * 64 * 64 * 4
    assert 0 < seconds < 1
