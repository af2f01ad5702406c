"""A `StopIteration` of user code ends the run with an error."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import LastK


class Failing:
    """Raise from a given call on; `calls` counts the calls."""

    def __init__(self, error: type[Exception], first: int) -> None:
        self.error, self.first, self.calls = error, first, 0

    def call(self) -> None:
        self.calls += 1
        assert self.calls < self.first + 20, "training goes on after the exception"
        if self.calls >= self.first:
            raise self.error


class FailingReward(LinearReward):
    def __init__(self, failing: Failing) -> None:
        super().__init__()
        self.failing = failing

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.failing.call()
        return super().forward(images, prompts)


class FailingTruncation(LastK):
    def __init__(self, failing: Failing) -> None:
        super().__init__(2)
        self.failing = failing

    def __call__(self, chain: SamplingChain, noise: Tensor) -> Tensor:
        self.failing.call()
        return super().__call__(chain, noise)


def direct(failing: Failing) -> RewardModule:
    return DraftModule(LinearModel(0.1), FailingReward(failing), DDIM(3))


def truncated(failing: Failing) -> RewardModule:
    return DraftModule(LinearModel(0.1), LinearReward(), DDIM(3), FailingTruncation(failing))


def policy(failing: Failing) -> RewardModule:
    return PolicyGradientModule(LinearModel(0.1), FailingReward(failing), DDIM(3, eta=1.0), samples_per_prompt=2)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"max_steps": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False, "default_root_dir": folder}
    return L.Trainer(accelerator="cpu", **{**quiet, **defaults, **options})


def data() -> PromptDataModule:
    return PromptDataModule(["a", "b", "c", "d"], batch_size=2, val_size=2)


def assert_explained(raised: pytest.ExceptionInfo[RuntimeError], error: type[Exception]) -> None:
    assert error.__name__ in str(raised.value)
    assert isinstance(raised.value.__cause__, error)


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize(("make", "first"), [(direct, 3), (truncated, 3), (policy, 1)])
def test_stop_iteration_in_a_training_step_is_an_error_with_its_cause(
    make: Callable[[Failing], RewardModule], first: int, error: type[Exception], tmp_path: Path
) -> None:
    failing = Failing(error, first)  # after the checks before the first step
    with pytest.raises(RuntimeError, match=r"next\(iterator, default\)") as raised:
        trainer(tmp_path, limit_val_batches=0).fit(make(failing), data())
    assert_explained(raised, error)
    assert failing.calls == first


@pytest.mark.parametrize("make", [direct, policy])
def test_stop_iteration_in_a_validation_step_is_an_error_with_its_cause(
    make: Callable[[Failing], RewardModule], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"next\(iterator, default\)") as raised:
        trainer(tmp_path).validate(make(Failing(StopIteration, 1)), data())
    assert_explained(raised, StopIteration)


class FailingGradient(torch.autograd.Function):
    """The identity, whose backward pass raises from the first backward pass of training on."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, failing: Failing) -> Tensor:
        ctx.failing = failing
        return images.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.failing.call()
        return gradient, None


class FailingBackward(FailingReward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return LinearReward.forward(self, FailingGradient.apply(images, self.failing), prompts)


def test_stop_iteration_in_the_backward_pass_is_an_error_with_its_cause(tmp_path: Path) -> None:
    failing = Failing(StopIteration, 3)
    module = DraftModule(LinearModel(0.1), FailingBackward(failing), DDIM(3))
    with pytest.raises(RuntimeError, match="^backward ended with the StopIteration") as raised:
        trainer(tmp_path, limit_val_batches=0).fit(module, data())
    assert_explained(raised, StopIteration)
    assert failing.calls == 3
