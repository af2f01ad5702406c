"""Rollouts of policy gradients: noise, micro-batches, prompts, and what is logged about them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.advantages import GroupRelative
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.policy import stochastic_steps
from lightning_draft.methods.rollout import Rollout, summarize
from lightning_draft.objectives import PRDP, Reinforce
from lightning_draft.rewards import Reward
from lightning_draft.samplers import DDIM, FlowSDE
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import LinearReward, scaled_linear
from tests.tiny_policy_gradients import MILD, fit, linear, make, stir, trainer_of
from tests.tiny_runs import PROMPTS, data


def test_rollouts_do_not_depend_on_micro_batches(tiny_sd: Path) -> None:
    """Bitwise for elementwise arithmetic; otherwise up to rounding."""

    class Wordy(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().forward(images, prompts) + torch.tensor([float(len(prompt)) for prompt in prompts])

    for make_one, exact in ((linear, True), (lambda **options: stir(make(tiny_sd, **options)), False)):
        whole = make_one(objective=PRDP(), reward=Wordy()).collect_rollout(PROMPTS[:3], number=5)
        for size in (1, 4):
            pieces = make_one(objective=PRDP(), reward=Wordy(), micro_batch_size=size).collect_rollout(
                PROMPTS[:3], number=5
            )
            for name in ("latents", "log_probs", "ref_log_probs", "rewards", "advantages"):
                ours, theirs = getattr(pieces, name), getattr(whole, name)
                assert torch.equal(ours, theirs) or not exact, name
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rollouts_depend_only_on_seed_and_number() -> None:
    """Also if a reward uses random numbers."""

    class Moody(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.rand(len(prompts))

    def collect(seed: int, number: int, before: int) -> Rollout:
        torch.manual_seed(before)
        state = torch.get_rng_state()
        rollout = linear(seed=seed, reward=Moody()).collect_rollout(PROMPTS[:2], number)
        assert torch.equal(torch.get_rng_state(), state)
        return rollout

    one, again = collect(0, 0, before=1), collect(0, 0, before=2)
    assert torch.equal(again.latents, one.latents)
    assert torch.equal(again.rewards, one.rewards)
    assert len(one.latents.unique()) == one.latents.numel()
    for other in (collect(0, 1, before=1), collect(1, 0, before=1)):
        assert not torch.isclose(other.latents[0], one.latents[0]).any()
        assert not torch.isclose(other.rewards, one.rewards).any()


def test_samples_of_a_prompt_can_share_the_starting_noise() -> None:
    whole = linear(share_start_noise=True).collect_rollout(PROMPTS[:2]).latents
    parts = linear(share_start_noise=True, micro_batch_size=3).collect_rollout(PROMPTS[:2]).latents
    assert torch.equal(whole, parts)
    assert torch.equal(whole[0, 0], whole[0, 1])
    assert not torch.isclose(whole[0, 1], whole[0, 2]).any()
    assert not torch.isclose(whole[1, 0], whole[1, 1]).all()


def test_sampled_steps_equal_those_of_the_chain_and_their_transitions_are_reproduced(tiny_sd: Path) -> None:
    module = make(tiny_sd)
    chain = SamplingChain(module.model, DDIM(3, eta=1.0), module.model.encode(PROMPTS[:2]))
    torch.manual_seed(0)
    noise = torch.randn(4, 2, *module.model.latent_shape)
    with torch.no_grad():
        walk = list(chain.sample_steps(noise[0], noise[1:]))
        state = chain.start(noise[0])
        for (transition, x), fresh in zip(walk, noise[1:], strict=True):
            expected = chain.transition(state)
            assert torch.equal(x, expected.mean + expected.std * fresh)
            assert torch.equal(transition.mean, expected.mean)
            state = replace(state, x=x, step=state.step + 1)
    again = chain.transitions_at(torch.stack([noise[0], *(x for _, x in walk)]), range(3))
    for (transition, x), other in zip(walk, again, strict=True):
        assert torch.equal(other.log_prob(x), transition.log_prob(x))


def test_trained_steps_are_those_that_add_noise() -> None:
    assert stochastic_steps(DDIM(4, eta=1.0), scaled_linear()) == [0, 1, 2]
    assert stochastic_steps(DDIM(3, eta=0.5), MILD) == [0, 1, 2]
    assert stochastic_steps(FlowSDE(3), RectifiedFlow()) == [0, 1]

    class Remembering(DDIM):
        def step(self, *arguments: Any) -> Any:
            return super().step(*arguments)[0], "something"

    with pytest.raises(ConfigurationError, match="Remembering is a multistep solver, which policy gradients do not"):
        stochastic_steps(Remembering(4, eta=1.0), scaled_linear())


def test_prompts_are_repeated_for_all_training_steps_of_their_rollout(tmp_path: Path) -> None:
    """Every prompt is used, epochs consist of complete rollouts, and a resumed loader continues at its position."""
    module, datamodule = linear(inner_epochs=2, timesteps_per_minibatch=1), data()
    trainer_of(tmp_path, max_epochs=1).fit(module, datamodule)
    loader = datamodule.train_dataloader()
    assert len(loader) == 2 * 6
    start = loader.state_dict()["position"]
    seen = list(loader)
    assert all(seen[i] == seen[i - i % 6] for i in range(12))
    assert sorted(seen[0] + seen[6]) == sorted(datamodule.train_prompts)
    assert module.reward_queries == 2 * 2 * 2
    again = datamodule.train_dataloader()
    again.load_state_dict({"position": start + 7})
    assert list(again) == seen[7:]


def test_second_fit_collects_new_rollouts(tmp_path: Path) -> None:
    module = linear(inner_epochs=2)
    fit(tmp_path, module)
    fit(tmp_path, module)
    assert module.reward_queries == 2 * 4


def test_accumulating_over_several_rollouts_is_on_policy(tmp_path: Path) -> None:
    module = linear(objective=Reinforce(), timesteps_per_minibatch=1)
    fit(tmp_path, module, steps=2, accumulate_grad_batches=6)
    assert module.reward_queries == 2 * 2 * 4


def test_logged_metrics_of_a_rollout_equal_their_formulas() -> None:
    class Fixed(Reward):
        differentiable = False

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.tensor([1.0, 3.0, 5.0, 5.0])

        def breakdown(self, samples: Any, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            assert 0 <= samples.images.min() <= samples.images.max() <= 1
            return self(samples, prompts), {"half": self(samples, prompts) / 2}

    rollout = linear(reward=Fixed(), advantage_estimator=GroupRelative()).collect_rollout(PROMPTS[:2])
    assert rollout.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert rollout.advantages.tolist() == [-1, 1, 0, 0]
    assert rollout.summary == pytest.approx(
        {
            "train/reward": 3.5,
            "train/reward/half": 1.75,
            "train/reward_within_prompts": 0.5,
            "train/reward_worst_prompt": 2,
            "train/reward_best_prompt": 5,
            "train/advantage_std": 0.5**0.5,
            "train/zero_advantage_groups": 0.5,
        }
    )


def test_zero_advantage_groups_are_those_with_only_zero_advantages() -> None:
    advantages = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, -1.0])
    assert summarize(torch.zeros(6), advantages, 3)["train/zero_advantage_groups"] == 0.5


def test_non_finite_scores_are_an_error() -> None:
    class Broken(LinearReward):
        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().forward(images, prompts).log() * float("nan")

    with pytest.raises(ValueError, match="Broken gave a score that is not finite .* for the prompts 'a red cat', "):
        linear(reward=Broken()).collect_rollout(PROMPTS[:1])
