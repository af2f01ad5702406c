"""Settings, models and loaders that policy gradients reject."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.advantages import PerPromptStatistics
from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import PRDP, Reinforce
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowSDE
from lightning_draft.testing import GaussianModel, LinearModel
from tests.tiny_policy_gradients import fit, linear, make, trainer_of
from tests.tiny_runs import PROMPTS, data


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"objective": Reinforce(), "inner_epochs": 2}, {}, "Reinforce is on-policy.* set inner_epochs to 1 and tr"),
        (
            {"objective": Reinforce(), "timesteps_per_minibatch": 1},
            {},
            "on-policy: .*set trainer.accumulate_grad_batches to 3, or use PPO",
        ),
        (
            {"objective": PRDP(), "timesteps_per_minibatch": 1},
            {},
            "PRDP couples .*set trainer.accumulate_grad_batches to 3",
        ),
        (
            {"objective": PRDP(), "inner_epochs": 2},
            {"accumulate_grad_batches": 2},
            "PRDP couples .*set trainer.accumulate_grad_batches to 1",
        ),
        (
            {"timesteps_per_minibatch": 1},
            {"accumulate_grad_batches": 2},
            "would not end with rollouts, because accumulate_grad_batches=2 .* in 3 training steps; set .* to 3",
        ),
        ({"sampler": DDIM(4)}, {}, r"DDIM adds no noise.*DDIM\(eta=1\)"),
        ({"sampler": DPMSolverPlusPlus(4)}, {}, "DPMSolverPlusPlus adds no noise"),
        ({"sampler": FlowSDE(4)}, {}, "the sampler does not fit the model: FlowSDE needs a rectified-flow model"),
        ({"samples_per_prompt": 1}, {}, "LeaveOneOut compares samples.*set samples_per_prompt to 2 or more"),
        (
            {"samples_per_prompt": 1, "objective": PRDP(), "advantage_estimator": PerPromptStatistics()},
            {},
            "PRDP compares samples",
        ),
        ({"model": GaussianModel()}, {}, "no trainable parameters"),
    ],
)
def test_configurations_that_cannot_improve_the_reward_are_rejected(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    module = linear(**options)
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(tmp_path, max_steps=1, **trainer).fit(module, data())
    assert module.reward_queries == 0


class Unused(LinearModel):
    """Its parameter is not used in sampling."""

    def forward(self, x: Tensor, t: float, conditioning: Any) -> Tensor:
        return 0.1 * x


def test_log_probabilities_without_gradient_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the log-probability's gradient reaches none of the trainable"):
        fit(tmp_path, linear(model=Unused(0.1)))
    with pytest.raises(
        ConfigurationError, match="trainable parameters have dtype bfloat16, in which small updates round"
    ):
        fit(tmp_path, make(tiny_sd), precision="bf16-true")


def test_an_optimizer_step_within_an_on_policy_rollout_is_an_error(tmp_path: Path) -> None:
    """Lightning makes such a step at the end of an epoch that was limited."""
    module = linear(objective=Reinforce(), timesteps_per_minibatch=1)
    with pytest.raises(
        ConfigurationError, match="before all minibatches of a rollout were used, and Reinforce is on-policy; leave out"
    ):
        fit(tmp_path, module, steps=4, accumulate_grad_batches=3, limit_train_batches=2)


def test_a_loader_that_changes_prompts_within_a_rollout_is_an_error(tmp_path: Path) -> None:
    module = linear(inner_epochs=2)
    loader = torch.utils.data.DataLoader(PROMPTS, batch_size=2, collate_fn=list)
    with pytest.raises(ConfigurationError, match="for 2 training steps, and the prompts changed before"):
        trainer_of(tmp_path, max_steps=2).fit(module, loader)


def test_batches_of_a_user_loader_are_checked(tmp_path: Path) -> None:
    module = linear(objective=PRDP(), timesteps_per_minibatch=1)
    with pytest.raises(ConfigurationError, match="PRDP couples .*set trainer.accumulate_grad_batches to 3"):
        trainer_of(tmp_path, max_steps=1).fit(module, [PROMPTS[:2]] * 3)
    assert module.reward_queries == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be at least 1"),
        ({"inner_epochs": 0}, "inner_epochs=0 must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"timesteps_per_minibatch": 0}, "timesteps_per_minibatch=0 must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be at least 0"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        linear(**options)
