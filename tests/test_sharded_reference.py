"""With FSDP2 and full fine-tuning, each process stores a shard of the original weights and trains as without shards."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_draft.advantages import GroupRelative
from lightning_draft.distributed import gather_full
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.methods.rollout import Rollout
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.objectives import PRDP
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK
from tests.two_processes import data, draft, fsdp2, together, trainer

LR = 1e-3
STEPS = 3


def full(folder: Path) -> StableDiffusion:
    return StableDiffusion(str(folder), guidance=Guidance(1.0), trainable="full")


def prdp(folder: Path) -> PolicyGradientModule:
    return PolicyGradientModule(
        model=full(folder),
        reward=ColorTarget(1.0, 0.0, 0.0),
        sampler=DDIM(2, eta=1.0),
        objective=PRDP(beta=0.1, clip=1e-2),
        advantage_estimator=GroupRelative(),
        samples_per_prompt=2,
        inner_epochs=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
    )


class Rollouts(L.Callback):
    """Records the rollout of each training step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.states.append(pl_module.buffer.rollout.state_dict())


def work(rank: int, root: Path, pipeline: Path) -> None:
    """Train with PRDP, and with DRaFT+ with and without shards."""
    options = {"gradient_clip_val": None, "limit_val_batches": 0}
    module, rollouts = prdp(pipeline), Rollouts()
    trainer(root, fsdp2(), rollouts, max_steps=STEPS, **options).fit(module, data())
    stored = sum(original.numel() for _, _, original in module.model._original._owners)
    torch.save({"rollouts": rollouts.states, "weights": gather_full(module), "stored": stored}, root / f"{rank}.pt")
    for name, strategy in {"ddp": "ddp", "fsdp2": fsdp2()}.items():
        plus = draft(pipeline, model=full(pipeline), truncation=LastK(1), kl_weight=100.0, checkpointing="block")
        plus.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=LR)
        trainer(root, strategy, max_steps=2, **options).fit(plus, data())
        torch.save(gather_full(plus), root / f"{name}-{rank}.pt")
    recomputed = draft(pipeline, model=full(pipeline), truncation=LastK(1), kl_weight=1.0, checkpointing="step")
    with pytest.raises(ConfigurationError, match="write checkpointing: block, or none"):
        trainer(root, fsdp2(), **options).fit(recomputed, data())


@pytest.fixture(scope="module")
def ran(tiny_sd_v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    assert together(work, root, tiny_sd_v) == [0, 0]
    return root


def test_prdp_with_shards_equals_one_process_on_the_rollouts_of_both(ran: Path, tiny_sd_v: Path) -> None:
    """Each update is that of the mean of both gradients; the reference is the model before training."""
    results = [torch.load(ran / f"{rank}.pt", weights_only=False) for rank in range(2)]
    alone, fresh = prdp(tiny_sd_v), prdp(tiny_sd_v)
    trained = alone.trainable_parameters()
    for step in range(STEPS):
        total = [torch.zeros_like(value) for value in trained.values()]
        for result in results:
            rollout = Rollout(**result["rollouts"][step])
            reference = fresh.policy.log_probs(rollout.prompts, rollout.latents)
            torch.testing.assert_close(rollout.ref_log_probs, reference, rtol=1e-5, atol=1e-5)
            assert torch.equal(rollout.log_probs, rollout.ref_log_probs) == (step < 2)
            prompts = rollout.prompts[::2]
            derivatives = alone.log_prob_gradients(prompts, rollout)
            loss, _ = alone.loss_and_logs(prompts, rollout, alone.minibatches(len(prompts))[0], derivatives)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            total = [sum_ if g is None else sum_ + g / 2 for sum_, g in zip(total, gradients, strict=True)]
        with torch.no_grad():
            for value, gradient in zip(trained.values(), total, strict=True):
                value -= LR * gradient
    original = fresh.trainable_parameters()
    for name, value in trained.items():
        moved = (value - original[name]).abs().max().item()
        for result in results:
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=1e-7 + 1e-3 * moved)
    assert sum(not torch.equal(value, original[name]) for name, value in trained.items()) > 0.9 * len(trained)


def test_each_process_stores_half_of_the_original_weights(ran: Path, tiny_sd_v: Path) -> None:
    stored = [torch.load(ran / f"{rank}.pt", weights_only=False)["stored"] for rank in range(2)]
    whole = sum(value.numel() for value in full(tiny_sd_v).denoiser.parameters())
    assert sum(stored) == whole
    assert max(stored) < 0.6 * whole


def test_penalty_on_the_distance_from_the_original_weights_equals_that_of_ddp(ran: Path) -> None:
    for rank in range(2):
        ours, theirs = (torch.load(ran / f"{name}-{rank}.pt") for name in ("fsdp2", "ddp"))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
