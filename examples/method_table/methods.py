"""What the table compares: the methods, and the rewards they are compared on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_draft.baselines import Baseline, GroupMean, LeaveOneOut, PerPromptStatistics
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.modules import DraftModule, RewardModule
from lightning_draft.objectives import PPO, PRDP, Objective, Reinforce
from lightning_draft.policy import PolicyGradientModule
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification, CLIPScore, JPEGSize, Reward, Sharpness
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
"""Attention, and where the caption's pooled embedding enters."""


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        model: The pipeline.
        clip: The CLIP of the rewards.
        prompts: What is drawn.
        captions: What the CLIP tells prompts from.
        sampling_steps: T; DDPM's ancestral sampler for all, since policy gradients need a stochastic one.
        rank: Of the adapters.
    """

    model: str
    clip: str
    prompts: str
    captions: str
    sampling_steps: int
    rank: int = 8


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

    return Method(module, batch_size=4, budget=3.0)


POLICY = {
    "REINFORCE": policy(Reinforce, PerPromptStatistics, 1),
    "PPO": policy(lambda: PPO(clip=1e-3), PerPromptStatistics, 2),
    "LOOP": policy(lambda: PPO(clip=1e-3), LeaveOneOut, 2),
    "PRDP": policy(lambda: PRDP(beta=1.0, clip=1e-3), GroupMean, 2),
}
METHODS: dict[str, Method] = {**DIRECT, **POLICY}

TASKS = {
    "recognised": Task(
        lambda setting: CLIPClassification(setting.clip, captions=setting.captions),
        lambda setting: {
            "retrieval": CaptionRetrieval(setting.clip, captions=setting.captions),
            "cosine": CLIPScore(setting.clip),
            "jpeg": JPEGSize(),
            "sharpness": Sharpness(),
        },
        tuple(METHODS),
    ),
    "jpeg": Task(
        lambda setting: JPEGSize(),
        lambda setting: {
            "retrieval": CaptionRetrieval(setting.clip, captions=setting.captions),
            "cosine": CLIPScore(setting.clip),
            "sharpness": Sharpness(),
        },
        tuple(POLICY),
    ),
}
"""Rewards: the prompt recognised by the CLIP, which has a gradient, and the true JPEG size, which has none."""
