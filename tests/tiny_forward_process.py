"""Forward-process modules of a linear model in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_draft.advantages import GroupRelative
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.rollout import Rollout
from lightning_draft.objectives import PPO, Reinforce
from lightning_draft.samplers import FlowEuler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import LinearModel
from tests.tiny_policy_gradients import BlackBox

PROMPTS = ["a red cat", "a cat"]
GROUP, THETA, OLD, BASE = 3, 0.3, 0.25, 0.2
VARIANTS: list[ForwardObjective] = [
    DiffusionNFT(0.5, advantage_clip=1.0),
    AWM(PPO(0.02, advantage_clip=None), power=1.0),
    AWM(Reinforce("sum")),
    RWR(0.7, max_weight=2.0),
    OnlineDPO(3.0),
    DGPO(2.0, clip=0.02, advantage_clip=1.2),
    DGPO(2.0, clip=None, reference="old"),
    CRD(0.8),
    CRD(0.8, "base"),
]
battery = pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: f"{type(o).__name__}")


def linear(**options: Any) -> ForwardProcessModule:
    """A module with a linear velocity model, whose base has `theta = BASE`."""
    defaults: dict[str, Any] = {
        "model": LinearModel(BASE, "flow", RectifiedFlow(), (3, 2, 2)),
        "reward": BlackBox(),
        "sampler": FlowEuler(4),
        "advantage_estimator": GroupRelative(divide_by_std=True),
        "samples_per_prompt": GROUP,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return ForwardProcessModule(**{**defaults, **options})


def in_float64(rollout: Rollout) -> Rollout:
    return replace(rollout, latents=rollout.latents.double(), advantages=rollout.advantages.double())


def moved(module: ForwardProcessModule) -> Rollout:
    """Collect a rollout with `theta = OLD`, then set `theta = THETA`."""
    module.model.theta.data.fill_(OLD)
    rollout = in_float64(module.collect_rollout(PROMPTS))
    module.model.theta.data.fill_(THETA)
    return rollout


def noised(module: ForwardProcessModule, rollout: Rollout, index: int, t: float) -> tuple[Tensor, Tensor]:
    """Return `x_t` and the network's target, with the noise of the documented seeds."""
    x0, shared = rollout.latents[-1], module.objective.shares_noise
    each = [
        module.model.noise(
            1, torch.Generator().manual_seed(derive_seed(0, 0, 0, i // GROUP if shared else i, 1, index))
        )
        for i in range(len(x0))
    ]
    eps = torch.cat(each).double()
    alpha, sigma = module.model.schedule.coefficients(t)
    target = eps - x0 if module.model.prediction == "flow" else eps
    return alpha * x0 + sigma * eps, target
