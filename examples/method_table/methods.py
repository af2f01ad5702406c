"""What the table compares: the methods, and the rewards they are compared on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from examples.emoji_model.nearest import NearestPicture
from lightning_draft.baselines import Baseline, GroupMean, LeaveOneOut, PerPromptStatistics
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.modules import DraftModule, RewardModule
from lightning_draft.objectives import PPO, PRDP, Objective, Reinforce
from lightning_draft.policy import PolicyGradientModule
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification, JPEGSize, Reward, Sharpness
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

LAYERS = ("attn2.to_k", "attn2.to_v", "add_embedding.proj", "time_emb_proj")
"""Where the caption enters: by attention, and pooled beside the time."""


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        model: The pipeline.
        clip: The CLIP of the rewards.
        prompts: What is drawn; the column `caption` says what the picture should be recognised as.
        captions: What the CLIP tells prompts from.
        sampling_steps: T; DDPM's ancestral sampler for all, since policy gradients need a stochastic one.
        pictures: Prepared emoji pictures, to look for the nearest in; None leaves that figure out.
        rank: Of the adapters.
    """

    model: str
    clip: str
    prompts: str
    captions: str
    sampling_steps: int
    pictures: str | None = None
    rank: int = 8

    def held_out(self) -> dict[str, Reward]:
        """Rewards that no method of any task is trained on."""
        nearest = {} if self.pictures is None else {"nearest": NearestPicture(self.pictures)}
        retrieval = CaptionRetrieval(self.clip, captions=self.captions, column="caption")
        return {"retrieval": retrieval, **nearest, "sharpness": Sharpness()}


@dataclass(frozen=True)
class Task:
    """A reward.

    Args:
        reward: What is trained on.
        watch: What is only looked at.
        methods: Which methods can train on it.
    """

    reward: Callable[[Setting], Reward]
    watch: Callable[[Setting], dict[str, Reward]]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """A method with its own settings.

    Args:
        module: Builds the module from what all methods share.
        batch_size: Prompts a step.
        budget: Share of the budget; policy gradients get more than direct methods, or there would be little to see.
    """

    module: Callable[..., RewardModule]
    batch_size: int = 8
    budget: float = 1.0

    def build(self, setting: Setting, task: str, lr: float, seed: int) -> RewardModule:
        """A fresh module."""
        return self.module(
            model=StableDiffusion(
                setting.model,
                lora=LoRA(rank=setting.rank, target_modules=LAYERS, seed=seed),
                guidance_scale=1.0,
            ),
            reward=TASKS[task].reward(setting),
            sampler=DDIM(setting.sampling_steps, eta=1.0),
            watch=TASKS[task].watch(setting),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4),
            seed=seed,
        )


def direct(truncation: Callable[[], Truncation]) -> Method:
    """Back-propagation through the sampler."""
    return Method(lambda **common: DraftModule(truncation=truncation(), **common))


DIRECT = {
    "DRaFT": direct(Full),
    "DRaFT-3": direct(lambda: LastK(3)),
    "DRaFT-1": direct(lambda: LastK(1)),
    "DRaFT-LV": direct(lambda: LowVariance(2)),
    "ReFL": direct(lambda: ReFL(4)),
    "AlignProp (paper)": direct(RandomK),
    "AlignProp (code)": direct(RandomSteps),
    "DRTune": direct(lambda: DRTune(3, 4)),
}


def policy(objective: Callable[[], Objective], baseline: Callable[[], Baseline], inner_epochs: int) -> Method:
    """A policy gradient: rollouts of 4 samples for each of 4 prompts."""

    def module(**common: Any) -> PolicyGradientModule:
        return PolicyGradientModule(
            objective=objective(), baseline=baseline(), samples_per_prompt=4, inner_epochs=inner_epochs, **common
        )

    return Method(module, batch_size=4, budget=2.0)


POLICY = {
    "REINFORCE": policy(lambda: Reinforce("sum"), lambda: PerPromptStatistics(min_count=4), 1),
    "PPO": policy(lambda: PPO(0.1, "sum"), lambda: PerPromptStatistics(min_count=4), 2),
    "LOOP": policy(lambda: PPO(0.1, "sum"), LeaveOneOut, 2),
    "PRDP": policy(lambda: PRDP(1.0, 0.1, "sum"), GroupMean, 2),
}
METHODS: dict[str, Method] = {**DIRECT, **POLICY}

TASKS = {
    "recognised": Task(
        lambda setting: CLIPClassification(setting.clip, captions=setting.captions, column="caption"),
        lambda setting: {**setting.held_out(), "jpeg": JPEGSize()},
        tuple(METHODS),
    ),
    "jpeg": Task(
        lambda setting: JPEGSize(),
        lambda setting: setting.held_out(),
        tuple(POLICY),
    ),
}
"""Rewards: the prompt recognised by the CLIP, which has a gradient, and the true JPEG size, which has none."""
