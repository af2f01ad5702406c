"""Policy gradients in two processes: one update, own rollouts, and resuming."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_draft.advantages import PerPromptStatistics
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.methods.rollout import Rollout
from lightning_draft.objectives import PPO
from tests.tiny_policy_gradients import linear, trainer_of
from tests.tiny_runs import data


class Note(Callback):
    """Records the random choices and the final parameters of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        notes = {
            "rollout": pl_module.buffer.rollout.state_dict(),
            "theta": pl_module.model.theta.detach(),
            "advantage_estimator": pl_module.advantage_estimator.state_dict(),
        }
        torch.save(notes, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_share_parameters_and_advantage_estimator_but_not_noise(tmp_path: Path) -> None:
    """The update is that of the mean of their gradients, with advantages from the rewards of both."""

    def module() -> PolicyGradientModule:
        return linear(
            advantage_estimator=PerPromptStatistics(4, 4),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            timesteps_per_minibatch=1,
        )

    options = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 3}
    trainer_of(tmp_path, Note(tmp_path), max_steps=1, **options).fit(module(), data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["theta"], two["theta"])
    assert one["advantage_estimator"] == two["advantage_estimator"]
    assert set(one["rollout"]["prompts"]).isdisjoint(two["rollout"]["prompts"])
    assert not torch.isclose(one["rollout"]["latents"][0], two["rollout"]["latents"][0]).any()
    rewards = torch.cat([notes["rollout"]["rewards"] for notes in (one, two)])
    advantages = torch.cat([notes["rollout"]["advantages"] for notes in (one, two)])
    torch.testing.assert_close(advantages, (rewards - rewards.mean()) / rewards.std(correction=0), rtol=1e-4, atol=1e-4)

    slopes = []
    for notes in (one, two):
        alone, rollout = module(), Rollout(**notes["rollout"])
        alone.timesteps_per_minibatch = None
        prompts = rollout.prompts[::2]
        loss, _ = alone.loss_and_logs(prompts, rollout, alone.minibatches(2)[0])
        slopes.append(torch.autograd.grad(loss, alone.model.theta)[0])
    assert one["theta"].item() == pytest.approx((0.1 - 0.1 * torch.stack(slopes).mean()).item(), rel=1e-6)


def test_each_process_resumes_with_its_own_rollout(tmp_path: Path) -> None:
    """Within a rollout; a single process collects a new rollout and warns."""
    settings = {"objective": PPO(clip=1e-2), "inner_epochs": 2}
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": True}
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    def run(steps: int, *callbacks: Callback, ckpt: Path | None = None) -> list[dict[str, Any]]:
        trainer = trainer_of(tmp_path, Note(tmp_path), *callbacks, max_steps=steps, **options)
        trainer.fit(linear(**settings), data(), ckpt_path=ckpt)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    straight = run(4)
    run(3, saving)
    resumed = run(4, ckpt=tmp_path / "step=3.ckpt")
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours["theta"], theirs["theta"])
        assert torch.equal(ours["rollout"]["latents"], theirs["rollout"]["latents"])
    with pytest.warns(UserWarning, match="of 2 processes and there are 1 now: the rollout is collected again"):
        trainer_of(tmp_path, max_steps=4).fit(linear(**settings), data(), ckpt_path=tmp_path / "step=3.ckpt")
