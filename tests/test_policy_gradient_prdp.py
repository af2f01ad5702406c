"""PRDP: its gradient in two passes, its memory, and the training of full weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_draft.advantages import GroupRelative
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.objectives import PRDP, PolicyBatch
from lightning_draft.samplers import DDIM
from tests.tiny_policy_gradients import fit, linear, make, trainer_of
from tests.tiny_runs import PROMPTS, data, values


def test_two_pass_gradient_of_prdp_equals_autograd() -> None:
    """In float64, after an update of the model, for a rollout with three samples per prompt."""
    module = linear(
        objective=PRDP(beta=0.1, clip=1e-3), samples_per_prompt=3, micro_batch_size=2, timesteps_per_minibatch=1
    )
    collected, every = module.collect_rollout(PROMPTS[:2]), [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    doubled = {
        name: getattr(collected, name).double() for name in ("latents", "log_probs", "ref_log_probs", "advantages")
    }
    rollout = replace(collected, **doubled)
    module.model.theta.data += 0.01
    derivatives = module.log_prob_gradients(PROMPTS[:2], rollout)
    minibatches = module.minibatches(2)
    assert len(minibatches) == 9
    ours = sum(
        torch.autograd.grad(
            minibatch.fraction * module.loss_and_logs(PROMPTS[:2], rollout, minibatch, derivatives)[0], theta
        )[0]
        for minibatch in minibatches
        for theta in [module.model.theta]
    )
    log_probs = module.policy.evaluate(every, rollout.latents, module.policy.steps)[0]
    batch = PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 3, rollout.ref_log_probs)
    loss = module.objective(batch)
    assert derivatives.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert 0 < module.objective.clipped(batch).double().mean() < 1
    torch.testing.assert_close(ours, torch.autograd.grad(loss, module.model.theta)[0], rtol=1e-9, atol=0)


def test_every_update_of_prdp_uses_the_current_model(tmp_path: Path) -> None:
    """The second update of a rollout, compared with autograd and explicit log-probabilities of the base."""
    start, lr = torch.tensor(0.15), 4e-3
    module = linear(
        objective=PRDP(beta=0.1, clip=10.0),
        inner_epochs=2,
        kl_weight=2.0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
    )
    module.model.theta.data.copy_(start)
    recorder = fit(tmp_path, module, steps=2)
    first, second = recorder.gradients
    rollout, fresh = module.buffer.rollout, linear()
    assert rollout is not None
    reference = fresh.policy.log_probs(rollout.prompts, rollout.latents)
    fresh.model.theta.data.copy_(start - lr * first.squeeze())
    log_probs, kl, _ = fresh.policy.evaluate(rollout.prompts, rollout.latents, fresh.policy.steps, fresh.model.base())
    assert kl is not None
    divergence = kl.mean()
    loss = module.objective(PolicyBatch(log_probs, rollout.log_probs, rollout.advantages, 2, reference))
    assert recorder.of("train/policy_loss")[1] == pytest.approx(loss.item(), rel=1e-4)
    assert recorder.of("train/loss")[1] == pytest.approx((loss + 2.0 * divergence).item(), rel=1e-4)
    pull = torch.autograd.grad(2.0 * divergence, fresh.model.theta, retain_graph=True)[0]
    expected = torch.autograd.grad(loss, fresh.model.theta)[0]
    assert pull > 1e-2 * expected.abs()
    expected += pull
    torch.testing.assert_close(second.squeeze(), expected, rtol=1e-4, atol=0)
    assert (second - first).abs() > 1e-2 * first.abs()


def test_memory_of_prdp_does_not_grow_with_the_steps(tiny_sd: Path) -> None:
    """Number of saved elements for the backward pass of a minibatch, including the gradients of log-probabilities."""

    def kept(steps: int) -> int:
        module = make(
            tiny_sd, objective=PRDP(), timesteps_per_minibatch=1, sampler=DDIM(steps, eta=1.0, spacing="trailing")
        )
        rollout, elements = module.collect_rollout(PROMPTS[:1]), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            derivatives = module.log_prob_gradients(PROMPTS[:1], rollout)
            module.loss_and_logs(PROMPTS[:1], rollout, module.minibatches(1)[0], derivatives)
        return elements

    assert kept(9) < 1.01 * kept(3)


@pytest.mark.parametrize("trainable", ["full", ["attn2"]], ids=str)
def test_prdp_trains_full_weights_and_resumes_bitwise(trainable: Any, tiny_sd: Path, tmp_path: Path) -> None:
    """The reference is the model before training, and a checkpoint contains only the trained weights."""

    def run(steps: int, *callbacks: Callback, ckpt: Path | None = None) -> PolicyGradientModule:
        module = make(
            tiny_sd,
            model={"trainable": trainable},
            objective=PRDP(beta=0.1, clip=1e-2),
            advantage_estimator=GroupRelative(),
            inner_epochs=2,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        )
        saving = {"enable_checkpointing": bool(callbacks)}
        trainer_of(tmp_path, *callbacks, max_steps=steps, **saving).fit(module, data(), ckpt_path=ckpt)
        return module

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    straight, resumed = run(4, saver), run(4, ckpt=tmp_path / "step=3.ckpt")
    before, after, again = values(make(tiny_sd, model={"trainable": trainable})), values(straight), values(resumed)
    trained = straight.trainable_parameters()
    chosen = {name for name in before if name.startswith("model.unet.") and (trainable == "full" or ".attn2." in name)}
    assert trained.keys() == chosen
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"].keys() == chosen
    for name, value in after.items():
        assert torch.equal(value, again[name]), name
        if name not in chosen:
            assert torch.equal(value, before[name]), name
    assert sum(not torch.equal(after[name], before[name]) for name in chosen) > 0.9 * len(chosen)
    rollout = straight.buffer.rollout  # collected after two optimizer steps
    assert rollout is not None
    fresh = make(tiny_sd, model={"trainable": trainable})
    reference = fresh.policy.log_probs(rollout.prompts, rollout.latents)
    assert rollout.ref_log_probs is not None
    assert torch.equal(rollout.ref_log_probs, reference)
    assert not torch.equal(rollout.log_probs, reference)
