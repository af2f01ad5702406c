"""The contract: prompts with metadata, and a first reward of one's own."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_draft.rewards import Prompt, Reward, check_scores


def test_a_prompt_is_its_text() -> None:
    prompt = Prompt("a red cat", {"count": 2})
    assert prompt == "a red cat"
    assert {prompt: 1}["a red cat"] == 1
    assert prompt.metadata == {"count": 2}
    assert Prompt("a cat").metadata == {}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_copies_of_a_prompt_keep_its_metadata(duplicate) -> None:
    prompt = duplicate(Prompt("a cat", {"count": 2}))
    assert type(prompt) is Prompt
    assert prompt == "a cat"
    assert prompt.metadata == {"count": 2}


def test_metadata_is_the_prompts_own() -> None:
    metadata = {"count": 2}
    prompt = Prompt("a cat", metadata)
    metadata["count"] = 3
    assert prompt.metadata == {"count": 2}


class Count(Reward):
    """Reads the metadata."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) * torch.tensor([float(prompt.metadata["count"]) for prompt in prompts])


def test_a_reward_needs_forward_alone() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    prompts = [Prompt("cats", {"count": 2}), Prompt("dogs", {"count": 4})]
    total, parts = Count().breakdown(images, prompts)
    assert total.tolist() == [1.0, 2.0]
    assert parts == {}
    assert Count.differentiable
    with pytest.raises(TypeError, match="abstract"):
        Reward()  # type: ignore[abstract]


def test_scores_are_one_an_image() -> None:
    scores = torch.zeros(2)
    assert check_scores(scores, 2, Count()) is scores
    with pytest.raises(ValueError, match=r"Count.forward returned shape \(2,\) for 3 images; .* shape \(3,\)"):
        check_scores(scores, 3, Count())
