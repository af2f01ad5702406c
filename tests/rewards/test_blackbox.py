"""Rewards by a Python function: what it receives, what it may return, how it is saved, and its time limit."""

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Prompt, Reward
from lightning_draft.rewards.blackbox import PythonFunction


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


@pytest.mark.parametrize("form", ["pil", "numpy", "tensor"])
def test_a_function_receives_the_format_that_it_asks_for(form: str, make_images: Callable[..., Tensor]) -> None:
    images = (make_images(3, 8, 10) * 1.6 - 0.3).requires_grad_()
    prompts = [Prompt("cats", {"count": 2}), "dogs", "birds"]
    seen: list[Any] = []

    def judge(*given: Any) -> Any:
        seen.extend(given)
        return np.arange(3)

    scores = PythonFunction(judge, form)(images, prompts)
    assert scores.tolist() == [0.0, 1.0, 2.0]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    given, words = seen
    assert words == prompts
    assert words[0].metadata == {"count": 2}
    exact = images.detach().clamp(0, 1)
    if form == "tensor":
        assert torch.equal(given, exact)
        return
    if form == "pil":
        assert {(image.mode, image.size) for image in given} == {("RGB", (10, 8))}
        given = np.stack([np.asarray(image) for image in given])
    assert given.dtype == np.uint8
    assert np.array_equal(given, (exact.permute(0, 2, 3, 1) * 255).round().byte().numpy())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"judge returned shape \(1,\) for 2 images; return one number per image \(the prompts 'a', 'b'\)"),
        (torch.ones(2, 1), r"shape \(2, 1\) for 2 images"),
        (0.5, r"shape \(\) for 2 images"),
        ([0.0, float("nan")], "judge returned scores that are not finite for the prompt 'b'$"),
        (np.array([np.inf, 1.0]), "not finite for the prompt 'a'$"),
        (None, "judge returned None, not numbers, for the prompts 'a', 'b'"),
        (["good", "bad"], "not numbers, for the prompts 'a', 'b'"),
    ],
)
def test_invalid_scores_of_a_function_name_the_prompts(answer: Any, message: str) -> None:
    def judge(images: Any, prompts: Any) -> Any:
        return answer

    with pytest.raises(ValueError, match=message):
        PythonFunction(judge)(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_an_exception_of_the_function_is_raised_unchanged() -> None:
    def judge(images: Any, prompts: Any) -> Any:
        raise KeyError("out of memory")

    with pytest.raises(KeyError, match="out of memory"):
        PythonFunction(judge)(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_a_function_is_imported_and_saved_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_images: Callable[..., Tensor]
) -> None:
    """As on the command line: parsed, saved, parsed again."""
    (tmp_path / "my_scores.py").write_text("def lengths(images, prompts):\n    return [len(p) for p in prompts]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    parser = ArgumentParser()
    parser.add_subclass_arguments(Reward, "reward")
    config = {"class_path": "PythonFunction", "init_args": {"function": "my_scores.lengths", "images": "numpy"}}
    saved = parser.dump(parser.parse_object({"reward": config}))
    assert "function: my_scores.lengths" in saved
    reward = parser.instantiate(parser.parse_string(saved)).reward
    assert isinstance(reward, PythonFunction)
    assert reward(make_images(2, 8, 8), ["a cat", "a"]).tolist() == [5.0, 1.0]
    assert PythonFunction("my_scores.lengths")(make_images(1, 8, 8), ["four"]).tolist() == [4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("brightness",), "is not an import path; write for example my_rewards.brightness"),
        (("no_such_module.judge",), "'no_such_module.judge' cannot be imported: No module named 'no_such_module'"),
        (("math.judge",), "'math.judge' cannot be imported: .* no attribute 'judge'"),
        (("math.pi",), "'math.pi' is not a function"),
        ((brightness, "jpeg"), "images='jpeg' is not a valid choice; write one of pil, numpy, tensor"),
    ],
)
def test_functions_that_cannot_be_imported_are_rejected(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PythonFunction(*arguments)


def test_a_function_has_a_time_limit() -> None:
    ready = threading.Event()
    endless = PythonFunction(lambda images, prompts: ready.wait(60), time_limit=0.2)
    with pytest.raises(TimeoutError, match="did not return within time_limit=0.2 s for the prompt 'a cat'"):
        endless(torch.zeros(1, 3, 4, 4), ["a cat"])
    ready.set()
    quick = PythonFunction(lambda images, prompts: [1.0], time_limit=60.0)
    assert quick(torch.zeros(1, 3, 4, 4), ["a cat"]).tolist() == [1.0]
